"""The CUDA backend of the chunked op: kernels on tensor cores for bf16 and fp16, on CUDA cores for fp32."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hylo_ops.gated_delta_rule import cuda_chunk, cuda_chunk_fp32

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def chunk_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` for inputs that `chunk_why_not` lets pass; never synchronises."""
    return _kernels(inputs[0]).forward(*inputs)


def chunk_backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs."""
    return _kernels(inputs[0]).backward(grads, *inputs)


def chunk_why_not(q: Tensor, **others: Any) -> str | None:
    """The reason why the chunked kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if q.dtype not in _DTYPES:
        return f"q is {q.dtype}, not bfloat16, float16 or float32"
    return _kernels(q).why_not(q, **others)


def _kernels(q: Tensor) -> ModuleType:
    return cuda_chunk_fp32 if q.dtype == torch.float32 else cuda_chunk
