"""The Triton backend of the short causal convolution: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.causal_conv1d import triton_fwd

    with torch.cuda.device_of(inputs[0]):
        return triton_fwd.forward(*inputs)


def backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs."""
    from hylo_ops.causal_conv1d import triton_bwd

    with torch.cuda.device_of(inputs[0]):
        return triton_bwd.backward(grads, *inputs)


def recurrent_forward(*inputs: Any) -> Tensor:
    """`recurrent_causal_conv1d` for inputs that `why_not` lets pass."""
    from hylo_ops.causal_conv1d import triton_recurrent

    with torch.cuda.device_of(inputs[0]):
        return triton_recurrent.forward(*inputs)


def why_not(x: Tensor, weight: Tensor, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    return None
