"""What the two recurrent mixers share: their parameters' first values, and the cache of one layer."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from hylo.mixers.packing import Input, is_settled, project, project_convolved, tensor_of
from hylo_ops import causal_conv1d, gated_rms_norm, recurrent_causal_conv1d


class ShortConv(nn.Module):
    """Weights of a depthwise causal convolution.

    Args:
        channels: D.
        width: W, in tokens.
    """

    def __init__(self, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """torch's default for a convolution that sees W inputs."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)


class GatedRMSNorm(nn.Module):
    """Norm of each head with a SiLU gate; transformers sets the weight of whatever is called RMSNorm to 1.

    Args:
        shape: of the weight: (V,) shared by the heads, or (H, V).
    """

    def __init__(self, shape: tuple[int, ...], eps: float, *, norm_before_gate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.eps, self.norm_before_gate = eps, norm_before_gate

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x [B, T, H, V], gate [B, T, H * V] -> [B, T, H * V]."""
        gate = gate.unflatten(-1, x.shape[2:]).to(x.dtype)
        y = gated_rms_norm(x, gate, self.weight, eps=self.eps, norm_before_gate=self.norm_before_gate)
        return y.flatten(2)


def reset_time_step(dt_bias: nn.Parameter, smallest: float = 1e-3, largest: float = 1e-1) -> None:
    """Log-uniform time steps, as bias before a softplus (mamba-ssm's default)."""
    dt = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(math.log(smallest), math.log(largest)).exp()
    init.copy_(dt_bias, dt + torch.log(-torch.expm1(-dt)))


def reset_decay(A_log: nn.Parameter, smallest: float, largest: float = 16.0) -> None:
    """Logarithm of a uniform decay rate; the lower end is kept off 0, whose logarithm is infinite."""
    init.copy_(A_log, torch.empty_like(A_log, dtype=torch.float32).uniform_(max(smallest, 1e-4), largest).log())


class LayerState:
    """Convolution and recurrent state of one layer in a transformers cache, or nowhere (training).

    `decoding` says that one token follows on a state that exists: the ops then update it in place.
    """

    def __init__(self, cache: Cache | None, layer_idx: int, tokens: int) -> None:
        self._cache, self._layer_idx, self._tokens = cache, layer_idx, tokens
        has_past = cache is not None and cache.has_previous_state(layer_idx)
        self._layer: Any = cache.layers[layer_idx] if cache is not None and has_past else None

    @property
    def decoding(self) -> bool:
        return self._layer is not None and self._tokens == 1

    @property
    def conv(self) -> Tensor | None:
        """[B, D, W]: the last inputs of the convolution."""
        return None if self._layer is None else self._layer.conv_states[0]

    @property
    def recurrent(self) -> Tensor | None:
        """[B, H, K, V], or [B, H, V, K] in Mamba2."""
        return None if self._layer is None else self._layer.recurrent_states[0]

    def keep_conv(self, final: Tensor) -> None:
        if self._cache is not None:
            self._cache.update_conv_state(final, self._layer_idx)

    def keep_recurrent(self, final: Tensor) -> None:
        if self._cache is not None:
            self._cache.update_recurrent_state(final, self._layer_idx)

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, of weights alone; a state that sees no training need not ask twice."""
        return make()

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Short convolution with SiLU over x [B, T, D]; keeps the last W inputs."""
        if self.decoding and self.conv is not None:
            return recurrent_causal_conv1d(x, weight, bias, self.conv, activation="silu")
        y, final = causal_conv1d(x, weight, bias, activation="silu", initial_state=self.conv)
        self.keep_conv(final)
        return y

    def project_and_convolve(self, x: Input, weight: Tensor, *groups: Sequence[nn.Linear]) -> list[Tensor]:
        """For each group what its layers make of x [B, T, D], side by side; the first one's through `convolve`."""
        if self.decoding and self.conv is not None:
            found = project_convolved(x, weight, self.conv, *groups)
            if found is not None:
                return found
        first, *others = project(x, *groups)
        return [self.convolve(first, weight, None), *others]

    def scan(self, chunk: Callable[..., Any], *args: Tensor) -> Tensor:
        """`chunk(*args, initial_state=...)`, whose state is kept."""
        o, final = chunk(*args, initial_state=self.recurrent)
        self.keep_recurrent(final)
        return o

    def step(self, step: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """`step(*args, state, settled_state=...)`, which updates the state in place; when decoding."""
        return step(*args, self.recurrent, settled_state=is_settled())

    def mix(self, scan: Callable[..., Any], step: Callable[..., Any], *args: Tensor | None, **options: Any) -> Tensor:
        """A whole mixer between its projections, both states with it.

        `step(*args, conv_state, state, **options, settled_state=...)` in place when decoding, else `scan(*args,
        conv_state=..., initial_state=..., **options)`, whose states are kept.
        """
        if self.decoding:
            return step(*args, self.conv, self.recurrent, **options, settled_state=is_settled())
        y, conv, final = scan(*args, conv_state=self.conv, initial_state=self.recurrent, **options)
        self.keep_conv(conv)
        self.keep_recurrent(final)
        return y


def widened(x: Tensor) -> Tensor:
    """At least float32: gates and decays are not left in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def without_padding(x: Input, padding_mask: Tensor | None) -> Input:
    """Zero where `padding_mask` [B, T] is 0, so that padding writes nothing into a state."""
    if padding_mask is None:
        return x
    x = tensor_of(x)
    return x * padding_mask[..., None].to(x.dtype)
