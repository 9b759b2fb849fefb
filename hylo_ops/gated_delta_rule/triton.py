"""The Triton backend of the gated delta rule: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_K = 256


def chunk_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` for inputs that `chunk_why_not` lets pass; never synchronises."""
    from hylo_ops.gated_delta_rule import triton_chunk_fwd

    with torch.cuda.device_of(inputs[0]):
        return triton_chunk_fwd.forward(*inputs)


def chunk_backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs."""
    from hylo_ops.gated_delta_rule import triton_chunk_bwd

    with torch.cuda.device_of(inputs[0]):
        return triton_chunk_bwd.backward(grads, *inputs)


def recurrent_forward(*inputs: Any) -> Tensor:
    """`recurrent_gated_delta_rule` for inputs that `recurrent_why_not` lets pass."""
    from hylo_ops.gated_delta_rule import triton_recurrent

    with torch.cuda.device_of(inputs[0]):
        return triton_recurrent.forward(*inputs)


def chunk_why_not(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, **_: Any
) -> str | None:
    """The reason why the chunked kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    return _why_not(q, k, v, g, beta, initial_state)


def recurrent_why_not(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, **_: Any) -> str | None:
    """The same for the decode kernel."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous: its strides are {tensor.stride()}"
    if state.stride()[2:] != (state.shape[3], 1):
        return f"the states of heads are not contiguous: the strides of state are {state.stride()}"
    return _why_not(q, k, v, g, beta, state)


def _why_not(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> str | None:
    if (reason := why_not_on_device_of("q", q)) is not None:
        return reason
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of one dtype"
    if state is not None and state.dtype == torch.float64:
        return "the state is float64"
    K, V = q.shape[3], v.shape[3]
    if K % 16 or not 0 < K <= _MAX_K:
        return f"K is {K}, not a multiple of 16 up to {_MAX_K}"
    if V % 16 or not V:
        return f"V is {V}, not a multiple of 16"
    return None
