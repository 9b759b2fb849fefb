"""Eager PyTorch form of the unit vectors and of their gradient: the specification, and the CPU backend."""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and what each row of x is multiplied with [...]."""
    wide = x.to(working_dtype(x))
    scale = torch.rsqrt(wide.square().sum(-1) + eps)
    return (wide * scale[..., None]).to(x.dtype).contiguous(), scale.contiguous()


def backward(grads: list[Tensor], saved: list[Tensor], x: Tensor, eps: float) -> list[Tensor]:
    scale = saved[0][..., None]
    n, dy = x.to(scale.dtype) * scale, grads[0].to(scale.dtype)
    return [((dy - n * (n * dy).sum(-1, keepdim=True)) * scale).to(x.dtype)]
