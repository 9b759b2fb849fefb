"""Eager PyTorch form of the short causal convolution: the specification, and the CPU backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import for_each_sequence, read_states, working_dtype, write_states, zero_padding


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """All tokens at once: a sum of W shifted products."""
    compute = working_dtype(x, weight)
    batch, _, width = x.shape[0], x.shape[1], weight.shape[1]

    def one(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        past = x.new_zeros(batch, width, x.shape[2]) if state is None else state.to(x.dtype).transpose(1, 2)
        window = torch.cat([past, x[:, tokens]], dim=1)  # [B, W + T, D]
        wide, length = window.to(compute), window.shape[1] - width
        taps = [wide[:, w + 1 : w + 1 + length] * weight[:, w].to(compute) for w in range(width)]
        y = torch.stack(taps).sum(0)
        return _finish(y, bias, activation, x.dtype), window[:, length:].transpose(1, 2).contiguous()

    return for_each_sequence(one, cu_seqlens, initial_state, x.shape[1])


def recurrent_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    activation: str | None,
) -> Tensor:
    """One token a sequence; `state` moves on by one column in place."""
    compute = working_dtype(x, weight)
    new = torch.cat([read_states(state, state_indices)[..., 1:], x.transpose(1, 2).to(state.dtype)], dim=-1)
    y = (new.to(compute) * weight.to(compute)).sum(-1)[:, None]  # [B, D, W] * [D, W] -> [B, 1, D]
    write_states(state, state_indices, new)
    return zero_padding(_finish(y, bias, activation, x.dtype), state_indices)


def step_by_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other."""
    batch, length, channels = x.shape
    state = x.new_zeros(batch, channels, weight.shape[1]) if initial_state is None else initial_state.clone()
    steps = [recurrent_causal_conv1d(x[:, t : t + 1], weight, bias, state, None, activation) for t in range(length)]
    return torch.cat(steps, dim=1), state


def _finish(y: Tensor, bias: Tensor | None, activation: str | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (F.silu(y) if activation == "silu" else y).to(dtype)
