"""The Triton backend of the gated RMS norm: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

MAX_WIDTH = 16384
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.gated_rms_norm import triton_fwd

    with torch.cuda.device_of(x):
        return triton_fwd.forward(x, gate, weight, eps, norm_before_gate)


def backward(
    grads: list[Tensor], x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool
) -> list[Tensor]:
    """Gradients of x, gate and weight, in their dtypes."""
    from hylo_ops.gated_rms_norm import triton_bwd

    with torch.cuda.device_of(x):
        return triton_bwd.backward(grads, x, gate, weight, eps, norm_before_gate)


def why_not(x: Tensor, gate: Tensor, weight: Tensor, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if weight.dtype not in _DTYPES:
        return f"weight is {weight.dtype}, not bfloat16, float16 or float32"
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight)):
        if tensor.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous: its strides are {tensor.stride()}"
    if not 0 < x.shape[3] <= MAX_WIDTH:
        return f"V is {x.shape[3]}, not between 1 and {MAX_WIDTH}"
    return None
