"""The Triton backend of the SSD scan: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_K = 256


def chunk_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`chunk_ssd` for inputs that `chunk_why_not` lets pass; never synchronises."""
    from hylo_ops.ssd import triton_chunk_fwd

    with torch.cuda.device_of(inputs[0]):
        return triton_chunk_fwd.forward(*inputs)


def chunk_backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs."""
    from hylo_ops.ssd import triton_chunk_bwd

    with torch.cuda.device_of(inputs[0]):
        return triton_chunk_bwd.backward(grads, *inputs)


def recurrent_forward(*inputs: Any) -> Tensor:
    """`recurrent_ssd` for inputs that `recurrent_why_not` lets pass."""
    from hylo_ops.ssd import triton_recurrent

    with torch.cuda.device_of(inputs[0]):
        return triton_recurrent.forward(*inputs)


def chunk_why_not(x: Tensor, b: Tensor, initial_state: Tensor | None, **_: Any) -> str | None:
    """The reason why the chunked kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    return _why_not(x, b, initial_state)


def recurrent_why_not(x: Tensor, b: Tensor, state: Tensor, **_: Any) -> str | None:
    """The same for the decode kernel."""
    return _why_not(x, b, state)


def _why_not(x: Tensor, b: Tensor, state: Tensor | None) -> str | None:
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if state is not None and state.dtype == torch.float64:
        return "the state is float64"
    K, V = b.shape[3], x.shape[3]
    if K % 16 or not 0 < K <= _MAX_K:
        return f"K is {K}, not a multiple of 16 up to {_MAX_K}"
    if V % 16 or not V:
        return f"V is {V}, not a multiple of 16"
    return None
