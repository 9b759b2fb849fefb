"""Eager PyTorch form of the RMS norm and of its gradients: the specification, and the CPU backend."""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the total (of no size without a residual), and what each row of it is multiplied with [...]."""
    compute = working_dtype(x, residual)
    total = x if residual is None else (residual.to(compute) + x.to(compute)).to(residual.dtype)
    wide = total.to(compute)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[..., None] * weight.to(compute)).to(dtype or x.dtype)
    return y.contiguous(), x.new_empty(0) if residual is None else total.contiguous(), rstd.contiguous()


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the total, of x (of no size where that is the same), and of the weight."""
    n = total.to(rstd.dtype) * rstd[..., None]
    dm = dy.to(rstd.dtype)
    dn = dm * weight.to(rstd.dtype)
    wide = (dn - n * (n * dn).mean(-1, keepdim=True)) * rstd[..., None]
    if dtotal is not None:
        wide = wide + dtotal.to(rstd.dtype)
    dx = total.new_empty(0, dtype=x_dtype) if x_dtype == total.dtype else wide.to(x_dtype).contiguous()
    dweight = (dm * n)[None].flatten(end_dim=-2).sum(0)
    return wide.to(total.dtype).contiguous(), dx, dweight.to(weight.dtype)
