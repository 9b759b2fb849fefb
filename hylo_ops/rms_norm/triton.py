"""The Triton backend of the RMS norm: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

MAX_WIDTH = 8192
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.rms_norm import triton_fwd

    with torch.cuda.device_of(x):
        return triton_fwd.forward(x, weight, residual, eps, dtype)


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the total, of x (of no size where that is the same), and of the weight."""
    from hylo_ops.rms_norm import triton_bwd

    with torch.cuda.device_of(total):
        return triton_bwd.backward(dy, dtotal, total, weight, rstd, x_dtype)


def why_not(
    x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype | None = None, **_: Any
) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    if dtype is not None and dtype not in _DTYPES:
        return f"y would be {dtype}, not bfloat16, float16 or float32"
    for name, tensor in (("x", x), ("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    if x.stride(-1) != 1:
        return f"the last dim of x is not contiguous: its strides are {x.stride()}"
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        return f"D is {x.shape[-1]}, not between 1 and {MAX_WIDTH}"
    return None


def backward_why_not(dy: Tensor, total: Tensor, weight: Tensor, x_dtype: torch.dtype, **_: Any) -> str | None:
    """Likewise of the backward: what it gets is what the forward took and gave."""
    if x_dtype not in _DTYPES:
        return f"x is {x_dtype}, not bfloat16, float16 or float32"
    return why_not(total, weight, None, dy.dtype)
