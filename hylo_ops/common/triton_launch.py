"""Launches of small Triton kernels, where a call takes as long as the host does.

`kernel[grid](...)` binds, classifies and hashes all arguments of a launch in Python. Here a kernel is found by what it
is compiled for, and launched as `triton.compiler.CompiledKernel` offers it to everybody.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_gpu import is_nvidia_from
from hylo_ops.common.triton_math import INTERPRETING

Number = int | float

_ALIGNMENT = 16  # of a pointer in bytes, of an integer: what Triton compiles for
_NUMBERS = 1 << 14

# The interpreter compiles nothing, and AMD's kernels are compiled for more than `launch` looks at.
_ALWAYS_BIND = INTERPRETING or torch.version.hip is not None

_compiled: dict[Hashable, Any] = {}


def ceil_div(a: int, b: int) -> int:
    """`triton.cdiv` without the 3 us that it takes on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """`triton.next_power_of_2`, likewise."""
    return 1 << (n - 1).bit_length()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: tuple[Number | tuple[Number, ...], ...],
    constants: tuple[Hashable, ...],
    num_warps: int,
    num_stages: int | None = None,
    early: bool = False,
) -> None:
    """`kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)` on the current device and stream.

    Triton's own settings (`triton.knobs`) are looked at when a kernel is compiled.

    Args:
        tensors: on the current device; the first is not None.
        numbers: the other arguments that are no constants.
        constants: the kernel's `tl.constexpr` arguments.
        num_stages: of loops with products; Triton's default if None.
        early: whether it may begin before the kernel ahead has ended, which it then waits for itself (NVIDIA, from
            sm_90 on).
    """
    options: dict[str, int | bool] = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if early:
        options["launch_pdl"] = True
    if _ALWAYS_BIND:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    kinds = [None if t is None else (t.dtype, t.data_ptr() % _ALIGNMENT == 0) for t in tensors]
    device = tensors[0].device  # type: ignore[union-attr]
    key = (kernel, device, num_warps, num_stages, early, constants, *kinds, *map(_kind_of_number, numbers))
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *numbers, *constants, **options)
    else:
        compiled[grid](*tensors, *numbers, *constants)


def starts_early() -> bool:
    """Whether a kernel on the current GPU can begin before the one ahead of it has ended."""
    return is_nvidia_from(90)


@functools.lru_cache(_NUMBERS, typed=True)
def _kind_of_number(number: Number | tuple[Number, ...]) -> Hashable:
    if isinstance(number, tuple):
        return tuple(map(_kind_of_number, number))
    if isinstance(number, float):
        return float
    return number == 1, number % _ALIGNMENT == 0, number.bit_length() < 32
