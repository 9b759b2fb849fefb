"""What Triton kernels over rows of the last dim share: tiles of whole rows, where strided ones lie, activations."""

import functools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import next_power_of_2

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_LOW = tl.constexpr(1.925963033500e-8)  # what float32 lacks of it
_LN_2 = tl.constexpr(0.6931471805599453)
_MOST_WARPS = 32
_Sizes = tuple[int, ...]


class Config(NamedTuple):
    """A tile of BR rows and BV columns, and the warps of its program."""

    BR: int
    BV: int
    num_warps: int


def config(V: int, elements: int, most_warps: int = _MOST_WARPS) -> Config:
    """At least 4 warps, whose threads have so many elements each, more where a row takes more warps than allowed."""
    BV = next_power_of_2(V)
    num_warps = min(max(4, BV // (32 * elements)), most_warps)
    return Config(max(1, num_warps * 32 * elements // BV), BV, num_warps)


@triton.jit
def exp_of_minus(b_z, PRECISE: tl.constexpr):
    if PRECISE:
        # The exponent in base 2 in two parts: rounding it costs |z| units of the last place. Nothing corrects infinity.
        b_high = b_z * -_LOG2_E
        b_low = tl.fma(b_z, -_LOG2_E_LOW, tl.fma(b_z, -_LOG2_E, -b_high))
        b_exp = tl.exp2(b_high)
        b_exp = tl.where(tl.abs(b_high) < 126.0, tl.fma(b_exp, b_low * _LN_2, b_exp), b_exp)
    else:
        b_exp = tl.exp(-b_z)
    return b_exp


@triton.jit
def sigmoid(b_z, PRECISE: tl.constexpr):
    return 1.0 / (1.0 + exp_of_minus(b_z, PRECISE))


@triton.jit
def silu(b_z, PRECISE: tl.constexpr):
    b_divisor = 1.0 + exp_of_minus(b_z, PRECISE)
    return tl.math.div_rn(b_z, b_divisor) if PRECISE else b_z / b_divisor


@triton.jit
def rows_of(i_tile, rows, tokens, heads, BR: tl.constexpr):
    """Of a tile's rows: which exist, their number among all, and batch entry, token and head, ready for strides."""
    o_row = i_tile * BR + tl.arange(0, BR)
    i_token = o_row // heads
    i_batch = i_token // tokens
    place = (i_batch.to(tl.int64), (i_token - i_batch * tokens).to(tl.int64), (o_row - i_token * heads).to(tl.int64))
    return o_row < rows, o_row.to(tl.int64), place


@triton.jit
def load_rows(p_tensor, strides, place, o_v, mask):
    """[BR, BV] in float32."""
    o_row = place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]
    return tl.load(p_tensor + o_row[:, None] + o_v, mask=mask, other=0.0).to(tl.float32)


def as_rows(x: Tensor) -> tuple[Tensor, _Sizes, _Sizes]:
    """x itself, its leading dims as three and their strides; a copy where strides leave more than three."""
    found = _merged(x.shape[:-1], x.stride()[:-1])
    if found is None:
        x = x.contiguous()
        found = _merged(x.shape[:-1], x.stride()[:-1])
        assert found is not None
    return x, *found


@functools.lru_cache(1 << 10)
def _merged(shape: _Sizes, strides: _Sizes) -> tuple[_Sizes, _Sizes] | None:
    """Dims that follow each other in memory as one, filled up to three; None if more are left."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == size * step:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 3:
        return None
    if len(sizes) == 1:  # the division by a last size of 1 costs nothing
        return (1, sizes[0], 1), (0, steps[0], 0)
    missing = 3 - len(sizes)
    return (*[1] * missing, *sizes), (*[0] * missing, *steps)
