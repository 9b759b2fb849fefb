"""The CUDA backend of the chunked op: kernels on tensor cores where they take the inputs, else those on CUDA cores."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hylo_ops.ssd import cuda_chunk, cuda_plain


def chunk_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`chunk_ssd` for inputs that `chunk_why_not` lets pass; never synchronises."""
    return _kernels(inputs[0]).forward(*inputs)


def chunk_backward(grads: list[Tensor], *inputs: Any, room: cuda_chunk.Room | None = None) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs. Kernels on tensor cores leave those of x, b and c
    in the room, if any."""
    kernels = _backward_kernels(inputs[0], inputs[3])
    return cuda_chunk.backward(grads, *inputs, room=room) if kernels is cuda_chunk else kernels.backward(grads, *inputs)


def chunk_why_not(x: Tensor, **others: Any) -> str | None:
    """The reason why no chunked kernels can take these inputs, either way, or None. Shapes are taken to be the op's."""
    if x.dtype not in cuda_plain.TYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    return _kernels(x).why_not(x, **others)


def fast_backward_why_not(x: Tensor, b: Tensor, **others: Any) -> str | None:
    """The same of a backward that is ahead of Triton's: on CUDA cores that is fp32's alone."""
    if _kernels(x) is cuda_plain:
        return chunk_why_not(x, b=b, **others)
    return cuda_chunk.backward_why_not(x, b, **others)


def _kernels(x: Tensor) -> ModuleType:
    return cuda_plain if x.dtype == torch.float32 else cuda_chunk


def _backward_kernels(x: Tensor, b: Tensor) -> ModuleType:
    return _kernels(x) if cuda_chunk.has_room_back(x, b) else cuda_plain
