"""The Triton backend of SwiGLU: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(gate_up: Tensor) -> Tensor:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.swiglu import triton_fwd

    with torch.cuda.device_of(gate_up):
        return triton_fwd.forward(gate_up)


def backward(grads: list[Tensor], gate_up: Tensor) -> list[Tensor]:
    """The gradient of gate_up, in its dtype."""
    from hylo_ops.swiglu import triton_bwd

    with torch.cuda.device_of(gate_up):
        return [triton_bwd.backward(grads[0], gate_up)]


def why_not(gate_up: Tensor, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("gate_up", gate_up)) is not None:
        return reason
    if gate_up.dtype not in _DTYPES:
        return f"gate_up is {gate_up.dtype}, not bfloat16, float16 or float32"
    if gate_up.stride(-1) != 1:
        return f"the last dim of gate_up is not contiguous: its strides are {gate_up.stride()}"
    return None
