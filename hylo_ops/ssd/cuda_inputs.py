"""What the chunked kernels on tensor cores and those on CUDA cores have in common: the inputs they take."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common import chunk_inputs

MAX_GRID = 65535
# ScalarType of csrc/common/scalar.h
NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_NONE = (0, 0, 0, 0, 0)


def why_not(x: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None) -> str | None:
    """The reason why no chunked kernel can take the inputs, or None. Shapes are taken to be the op's."""
    if not x.is_cuda:
        return f"x is on {x.device}, not on a CUDA device"
    return chunk_inputs.why_not({"x": x, "b": b, "c": c}, b.shape[3], x.shape[3], initial_state)


def of_tokens(numbers: Tensor) -> tuple[int, int, int, int, int]:
    """[B, T, H] as launchers take them."""
    stride_b, stride_t, stride_h = numbers.stride()
    return numbers.data_ptr(), NUMBERS[numbers.dtype], stride_b, stride_t, stride_h


def of_heads(numbers: Tensor | None) -> tuple[int, int, int, int, int]:
    """The same of [H]."""
    return _NONE if numbers is None else (numbers.data_ptr(), NUMBERS[numbers.dtype], 0, 0, numbers.stride(0))


def room_for_parts(x: Tensor, chunks: int, heads: int, cu_seqlens: Tensor | None, more: int = 0) -> Tensor:
    """Of the gradients of d, dt_bias and a by chunk, and so many more of the latter. Packed sequences may have fewer
    chunks than there are places."""
    make = x.new_empty if cu_seqlens is None else x.new_zeros
    return make((3 * chunks + more, heads), dtype=torch.float32)


def sum_parts(native: Any, kernel: Any, parts: Tensor, given: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Those gradients, of what of the three (d, dt_bias, a) is given, by either call's `vectors`."""
    sums = [None if t is None else torch.empty_like(t) for t in given]
    types = [0 if t is None else NUMBERS[t.dtype] for t in sums]
    native.vectors(kernel, parts.data_ptr(), [chunk_inputs.pointer(t) for t in sums], types)
    return sums
