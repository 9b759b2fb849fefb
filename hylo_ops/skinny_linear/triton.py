"""The Triton backend of products of few rows: which inputs it takes, and its kernel, imported on first use."""

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

_DTYPES = (torch.bfloat16, torch.float16)
_WIDTH = 16  # numbers that K is a multiple of: a product's own depth, and whole accesses


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, swiglu: bool, constant: bool) -> Tensor:
    """y for inputs that `why_not` lets pass, or `residual` with the product added; never synchronises."""
    from hylo_ops.skinny_linear import triton_fwd

    with torch.cuda.device_of(x):
        return triton_fwd.forward(x, weight, residual, swiglu, constant)


def why_not(x: Tensor, weight: Tensor, residual: Tensor | None, swiglu: bool, constant: bool) -> str | None:
    """The reason why the kernel cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("x", x)) is not None:
        return reason
    if x.dtype not in _DTYPES:
        return f"x is {x.dtype}, not bfloat16 or float16"
    K = x.shape[-1]
    if K % _WIDTH or not K:
        return f"K is {K}, not a multiple of {_WIDTH}"
    if weight.stride(1) != 1:
        return f"the last dim of weight is not contiguous: its strides are {weight.stride()}"
    if residual is not None and (residual.stride(-1) != 1 or not _are_rows(residual)):
        return f"the rows of residual are not contiguous or not evenly apart: its strides are {residual.stride()}"
    return None


def _are_rows(tensor: Tensor) -> bool:
    """Whether all dims but the last are one in memory."""
    try:
        tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return False
    return True
