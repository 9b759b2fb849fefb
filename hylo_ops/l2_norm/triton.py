"""The Triton backend of the unit vectors: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

MAX_WIDTH = 8192
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.l2_norm import triton_fwd

    with torch.cuda.device_of(x):
        return triton_fwd.forward(x, eps)


def backward(grads: list[Tensor], saved: list[Tensor], x: Tensor, eps: float) -> list[Tensor]:
    """The gradient of x, in its dtype."""
    from hylo_ops.l2_norm import triton_bwd

    with torch.cuda.device_of(x):
        return [triton_bwd.backward(grads[0], saved[0], x)]


def why_not(x: Tensor, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if x.stride(-1) != 1:
        return f"the last dim of x is not contiguous: its strides are {x.stride()}"
    if not 0 < x.shape[-1] <= MAX_WIDTH:
        return f"K is {x.shape[-1]}, not between 1 and {MAX_WIDTH}"
    return None
