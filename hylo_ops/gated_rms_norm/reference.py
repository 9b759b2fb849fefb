"""Eager PyTorch form of the gated RMS norm: the specification, and the CPU backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    compute = working_dtype(x)
    wide, factor = x.to(compute), F.silu(gate.to(compute))
    if not norm_before_gate:
        wide = wide * factor
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
    return (y * factor if norm_before_gate else y).to(x.dtype)
