"""A product of a decode step with what comes before and behind it: a norm, an activation, a short convolution."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.causal_conv1d import reference as convolution
from hylo_ops.causal_conv1d.op import recurrent_causal_conv1d
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, reference_backend
from hylo_ops.rms_norm.op import rms_norm
from hylo_ops.skinny_linear import cuda
from hylo_ops.skinny_linear import reference as product
from hylo_ops.skinny_linear.op import MOST_ROWS, skinny_linear

_WIDTHS = (2, 3, 4)
_ACTIVATIONS = (None, "silu")


def linear_step(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    swiglu: bool = False,
    conv_weight: Tensor | None = None,
    conv_state: Tensor | None = None,
    activation: str | None = None,
    constant_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`skinny_linear` of one token of each sequence, with what a layer has before and behind it:

        n = x / sqrt(mean(x^2) + eps) * norm_weight;   y = n W^T
        with swiglu      y <- silu(gate) * up,   [gate, up] = y
        with conv_weight y[:D] <- activation(convolve(y[:D]))

    Dims: B batch (1 to 64), K width of x, N width of y, D channels, at most N, W width of the convolution (2 to 4).
    Args:
        x: [B, 1, K] bf16 | fp16 | fp32 | fp64.
        weight: [N, K], or [2 N, K] with swiglu, the gate's rows first; dtype of x.
        norm_weight: [K]; x is taken as it is if None.
        eps: added to the mean square.
        swiglu: whether both halves of the product are one activation; not beside a convolution.
        conv_weight: [D, W] or None. The last column meets the newest token.
        conv_state: [B, D, W], with `conv_weight`. The last W inputs, oldest first; updated in place.
        activation: None | "silu", of the convolution.
        constant_weight: that no work still under way on the device writes `weight` or `norm_weight`. Kernels may then
            read them before the one ahead has ended.
        backend: None picks the first that supports the inputs; a named one never falls back. "composed" is the ops one
            after the other.
    Returns:
        y: [B, 1, N], dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated, or a gradient is wanted; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 sums (fp64 for fp64). On "cuda" x times the norm's weights is rounded and the sums are divided by
        the root; "composed" rounds what is normed. An input of the convolution is rounded to its state's dtype before
        it is used. Not differentiable; deterministic: yes.
    Source: RMSNorm (arXiv 1910.07467), equation 4; Mamba (arXiv 2312.00752), section 3.4; Stream-K (arXiv 2301.03598),
        its fixed split.
    """
    _check(x, weight, norm_weight, swiglu, conv_weight, conv_state, activation)
    of_conv = conv_weight, conv_state, activation
    return _linear_step(x, weight, norm_weight, float(eps), swiglu, *of_conv, constant_weight, backend)


def _check(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    swiglu: bool,
    conv_weight: Tensor | None,
    conv_state: Tensor | None,
    activation: str | None,
) -> None:
    checks.shape("x", x, "B", 1, "K")
    checks.dtype("x", x, checks.FLOATS)
    if not 0 < x.shape[0] <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} sequences, got {x.shape[0]} in {list(x.shape)}")
    checks.shape("weight", weight, "2 N" if swiglu else "N", x.shape[2])
    checks.dtype("weight", weight, (x.dtype,))
    if swiglu and weight.shape[0] % 2:
        raise ValueError(f"weight must have shape [2 N, K] with swiglu, got {list(weight.shape)}")
    if norm_weight is not None:
        checks.shape("norm_weight", norm_weight, x.shape[2])
        checks.dtype("norm_weight", norm_weight, checks.FLOATS)
    checks.choice("activation", activation, _ACTIVATIONS)
    _check_conv(x, weight, swiglu, conv_weight, conv_state)
    others = {"weight": weight, "norm_weight": norm_weight, "conv_weight": conv_weight, "conv_state": conv_state}
    checks.same_device("x", x, **others)
    for name, tensor in {"x": x, **others}.items():
        if tensor is not None:
            checks.no_gradient(name, tensor)


def _check_conv(x: Tensor, weight: Tensor, swiglu: bool, conv_weight: Tensor | None, conv_state: Tensor | None) -> None:
    if conv_weight is None or conv_state is None:
        if conv_weight is not None or conv_state is not None:
            raise ValueError("conv_weight and conv_state must come together, got one of them")
        return
    if swiglu:
        raise ValueError("swiglu and conv_weight must not come together, got both")
    checks.shape("conv_weight", conv_weight, "D", "W")
    checks.choice("the width of conv_weight", conv_weight.shape[1], _WIDTHS)
    if conv_weight.shape[0] > weight.shape[0]:
        raise ValueError(
            f"conv_weight must have at most as many channels as weight has rows, {weight.shape[0]}, got "
            f"{conv_weight.shape[0]}"
        )
    checks.shape("conv_state", conv_state, x.shape[0], *conv_weight.shape)
    checks.dtype("conv_state", conv_state, checks.FLOATS)


class _Inputs(NamedTuple):
    """The op's, in its order."""

    x: Tensor
    weight: Tensor
    norm_weight: Tensor | None
    eps: float
    swiglu: bool
    conv_weight: Tensor | None
    conv_state: Tensor | None
    activation: str | None
    constant_weight: bool


def _reference(*args: Any) -> Tensor:
    p = _Inputs(*args)
    compute = working_dtype(p.x)
    x = p.x.to(compute)
    if p.norm_weight is not None:
        x = F.rms_norm(x, (x.shape[-1],), p.norm_weight.to(compute), p.eps)
    y = product.forward(x, p.weight, None, p.swiglu, False)
    if p.conv_weight is not None and p.conv_state is not None:
        first = y[..., : len(p.conv_weight)]
        mixed = convolution.recurrent_causal_conv1d(first, p.conv_weight, None, p.conv_state, None, p.activation)
        first.copy_(mixed)
    return y.to(p.x.dtype)


def _composed(*args: Any) -> Tensor:
    p = _Inputs(*args)
    x = p.x if p.norm_weight is None else rms_norm(p.x, p.norm_weight, eps=p.eps)
    y = skinny_linear(x, p.weight, swiglu=p.swiglu, constant_weight=p.constant_weight)
    if p.conv_weight is not None and p.conv_state is not None:
        first = y[..., : len(p.conv_weight)]
        first.copy_(recurrent_causal_conv1d(first, p.conv_weight, None, p.conv_state, activation=p.activation))
    return y


def _composed_why_not(x: Tensor, **_: Any) -> str | None:
    """On a CPU the reference does the same and rounds less often."""
    return None if x.is_cuda else f"x is on {x.device}, not on a CUDA device"


def _cuda(*args: Any) -> Tensor:
    p = _Inputs(*args)
    conv: dict[str, Any] = {"conv_weight": p.conv_weight, "conv_state": p.conv_state, "silu": p.activation == "silu"}
    return cuda.forward(p.x, p.weight, None, p.swiglu, p.constant_weight, norm=p.norm_weight, eps=p.eps, **conv)


def _cuda_why_not(**args: Any) -> str | None:
    p = _Inputs(**args)
    return cuda.why_not(p.x, p.weight, None, p.swiglu, p.constant_weight, p.norm_weight, p.conv_weight, p.conv_state)


def _fake(x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, swiglu: bool, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if swiglu else 1)))


_linear_step = define_op(
    "linear_step",
    "(Tensor x, Tensor weight, Tensor? norm_weight, float eps, bool swiglu, Tensor? conv_weight, "
    "Tensor(a!)? conv_state, str? activation, bool constant_weight, str? backend) -> Tensor",
    backends=[
        Backend("cuda", _cuda_why_not, _cuda),
        Backend("composed", _composed_why_not, _composed),
        reference_backend(_reference),
    ],
    fake=_fake,
    skips_dispatcher=True,
)
