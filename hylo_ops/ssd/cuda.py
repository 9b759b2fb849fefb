"""The CUDA backend of the chunked op: kernels on tensor cores where they take the inputs, else those on CUDA cores."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hylo_ops.ssd import cuda_chunk, cuda_plain


def chunk_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_ssd` for inputs that `chunk_why_not` lets pass, and the states that its backward can begin with, if the
    last input asks for them; never synchronises."""
    *others, save_states = inputs
    if _kernels(inputs[0]) is cuda_chunk:
        return cuda_chunk.forward(*others, save_states=save_states)
    return *cuda_plain.forward(*others), inputs[0].new_empty(0)


def chunk_backward(
    grads: list[Tensor], saved: list[Tensor], *inputs: Any, room: cuda_chunk.Room | None = None
) -> list[Tensor]:
    """Its gradients, in the order of the op's differentiable inputs. Kernels on tensor cores leave those of x, b and c
    in the room, if any."""
    if _backward_kernels(inputs[0], inputs[3]) is cuda_chunk:
        return cuda_chunk.backward(grads, *inputs[:-1], states=saved[0], room=room)
    return cuda_plain.backward(grads, *inputs[:-1])


def saved_states(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, fixed_split: bool, save_states: bool
) -> Tensor:
    """An empty tensor as the last result of `chunk_forward` is."""
    shape: tuple[int, ...] = (0,)
    if save_states and x.is_cuda and torch.cuda.is_available() and _kernels(x) is cuda_chunk:
        shape = cuda_chunk.saved_shape(x, dt, b, c, cu_seqlens, fixed_split)
    return x.new_empty(shape, dtype=torch.float32)


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
