"""Eager PyTorch form of products of few rows: the specification, and the CPU backend."""

import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, swiglu: bool, constant: bool) -> Tensor:
    """y, which is `residual` with the product added if that is given."""
    compute = working_dtype(x)
    y = F.linear(x.to(compute), weight.to(compute))
    if swiglu:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if residual is not None:
        return residual.copy_(residual.to(compute) + y)
    return y.to(x.dtype).contiguous()
