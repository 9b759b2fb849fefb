"""Eager PyTorch form of SwiGLU: the specification, and the CPU backend."""

import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(working_dtype(gate_up)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype).contiguous()
