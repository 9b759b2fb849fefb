"""Forward of the gated RMS norm in Triton, and what its kernel shares with the backward's.

A program takes a tile of whole rows: docs/gated_rms_norm.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOG2_E_LOW = tl.constexpr(1.925963033500e-8)  # what float32 lacks of it
_LN_2 = tl.constexpr(0.6931471805599453)
_ELEMENTS = 16  # of a thread


class Config(NamedTuple):
    """A tile of BR rows and BV columns, and the warps of its program."""

    BR: int
    BV: int
    num_warps: int


def config(V: int, elements: int = _ELEMENTS) -> Config:
    """At least 4 warps, whose threads have so many elements each."""
    BV = next_power_of_2(V)
    num_warps = max(4, BV // (32 * elements))
    return Config(max(1, num_warps * 32 * elements // BV), BV, num_warps)


@triton.jit
def sigmoid(b_z, PRECISE: tl.constexpr):
    if PRECISE:
        # The exponent in base 2 in two parts: rounding it costs |z| units of the last place. Nothing corrects infinity.
        b_high = b_z * -_LOG2_E
        b_low = tl.fma(b_z, -_LOG2_E_LOW, tl.fma(b_z, -_LOG2_E, -b_high))
        b_exp = tl.exp2(b_high)
        b_exp = tl.where(tl.abs(b_high) < 126.0, tl.fma(b_exp, b_low * _LN_2, b_exp), b_exp)
    else:
        b_exp = tl.exp(-b_z)
    return 1.0 / (1.0 + b_exp)


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


@triton.jit
def gated_rms_norm_fwd_kernel_y(
    p_x,
    p_gate,
    p_weight,
    p_y,
    x_strides,
    gate_strides,
    weight_stride_h,
    rows,
    tokens,
    heads,
    eps,
    V: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    PRECISE: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, BR)
    o_v = tl.arange(0, BV)
    mask = m_row[:, None] & (o_v < V)
    b_u = load_rows(p_x, x_strides, place, o_v, mask)
    b_gate = load_rows(p_gate, gate_strides, place, o_v, mask)
    b_gate *= sigmoid(b_gate, PRECISE)
    if not NORM_BEFORE_GATE:
        b_u *= b_gate
    scale = tl.rsqrt(tl.sum(b_u * b_u, axis=1) * (1.0 / V) + eps)
    p_w = p_weight + (place[2] * weight_stride_h)[:, None] + o_v
    b_y = b_u * scale[:, None] * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        b_y *= b_gate
    tl.store(p_y + o_row[:, None] * V + o_v, b_y.to(p_y.dtype.element_ty), mask=mask)


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    """The op's forward; all but the last dim may be strided."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    B, T, H, V = x.shape
    rows = B * T * H
    if not y.numel():
        return y
    BR, BV, num_warps = config(V)
    weight_stride = weight.stride(0) if weight.ndim == 2 else 0
    launch(
        gated_rms_norm_fwd_kernel_y,
        (ceil_div(rows, BR), 1, 1),
        (x, gate, weight, y),
        (x.stride()[:3], gate.stride()[:3], weight_stride, rows, T, H, float(eps)),
        (V, norm_before_gate, x.dtype == torch.float32, BR, BV),
        num_warps,
    )
    return y
