"""Backward of the gated RMS norm in Triton: dx, dgate and parts of dweight out of one pass over x, gate and dy.

Programs walk over tiles of rows at a step of whole tokens, so each row of a tile always meets the same head. Rows too
wide for that are read twice, once for their sums: docs/gated_rms_norm.md.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_rows import Config, config, load_rows, rows_of, sigmoid

_WARPS = 24 * 132  # of all programs: as many as the registers of an H100's or H200's multiprocessors hold
_MAX_KEPT_WIDTH = 4096
_ELEMENTS = 8  # of a thread
_WIDE = Config(1, 2048, 8)


@triton.jit
def _gate(b_gate, PRECISE: tl.constexpr):
    """silu and its slope."""
    b_open = sigmoid(b_gate, PRECISE)
    b_silu = b_gate * b_open
    return b_silu, tl.fma(b_silu, 1.0 - b_open, b_open)


@triton.jit
def _normed(b_x, b_dy, b_silu, NORM_BEFORE_GATE: tl.constexpr):
    """What gets normalised, and the gradient of weight times that over its root mean square."""
    if NORM_BEFORE_GATE:
        return b_x, b_dy * b_silu
    return b_x * b_silu, b_dy


@triton.jit
def _norm(squares, products, eps, V: tl.constexpr):
    """scale and pull of du = scale * dn - pull * n, from the sums of u * u and u * dn over a row."""
    scale = tl.rsqrt(squares * (1.0 / V) + eps)
    return scale, products * (1.0 / V) * scale * scale


@triton.jit
def gated_rms_norm_bwd_kernel_norm(
    p_dy,
    p_x,
    p_gate,
    p_weight,
    p_norm,
    dy_strides,
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
    BV: tl.constexpr,
):
    """scale and pull of a wide row."""
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, 1)
    b_squares = tl.zeros([1, BV], dtype=tl.float32)
    b_products = tl.zeros([1, BV], dtype=tl.float32)
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        mask = m_row[:, None] & (o_v < V)
        b_silu, _ = _gate(load_rows(p_gate, gate_strides, place, o_v, mask), PRECISE)
        b_x = load_rows(p_x, x_strides, place, o_v, mask)
        b_u, b_d = _normed(b_x, load_rows(p_dy, dy_strides, place, o_v, mask), b_silu, NORM_BEFORE_GATE)
        p_w = p_weight + (place[2] * weight_stride_h)[:, None] + o_v
        b_squares += b_u * b_u
        b_products += b_u * b_d * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
    scale, pull = _norm(tl.sum(b_squares, axis=1), tl.sum(b_products, axis=1), eps, V)
    tl.store(p_norm + 2 * o_row, scale)
    tl.store(p_norm + 2 * o_row + 1, pull)


@triton.jit
def gated_rms_norm_bwd_kernel_dx(
    p_dy,
    p_x,
    p_gate,
    p_weight,
    p_norm,
    p_dx,
    p_dgate,
    p_partials,
    dy_strides,
    x_strides,
    gate_strides,
    weight_stride_h,
    rows,
    tokens,
    heads,
    tiles,
    eps,
    SHARED_WEIGHT: tl.constexpr,
    V: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    PRECISE: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """dx and dgate; a line of dweight's parts for each program, or for each row of its tiles."""
    i_program = tl.program_id(0)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_line = i_program * BR + tl.arange(0, BR)
    p_w = p_weight + ((o_line % heads).to(tl.int64) * weight_stride_h)[:, None] + o_v
    b_weight = tl.load(p_w, mask=(o_line >= 0)[:, None] & m_v, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BR, BV], dtype=tl.float32)
    for i_tile in range(i_program, tiles, tl.num_programs(0)):
        m_row, o_row, place = rows_of(i_tile, rows, tokens, heads, BR)
        mask = m_row[:, None] & m_v
        b_x = load_rows(p_x, x_strides, place, o_v, mask)
        b_gate = load_rows(p_gate, gate_strides, place, o_v, mask)
        b_dy = load_rows(p_dy, dy_strides, place, o_v, mask)
        b_silu, b_slope = _gate(b_gate, PRECISE)
        b_u, b_d = _normed(b_x, b_dy, b_silu, NORM_BEFORE_GATE)
        b_dn = b_d * b_weight
        if p_norm is None:
            scale, pull = _norm(tl.sum(b_u * b_u, axis=1), tl.sum(b_u * b_dn, axis=1), eps, V)
        else:
            scale = tl.load(p_norm + 2 * o_row, mask=m_row, other=0.0)
            pull = tl.load(p_norm + 2 * o_row + 1, mask=m_row, other=0.0)
        scale = tl.where(m_row, scale, 0.0)[:, None]  # with eps 0 it is infinite where no row is
        b_n = b_u * scale
        b_du = b_dn * scale - b_n * tl.where(m_row, pull, 0.0)[:, None]
        b_dweight += b_d * b_n
        if NORM_BEFORE_GATE:
            b_dx = b_du
            b_dgate = b_dy * b_weight * b_n * b_slope
        else:
            b_dx = b_du * b_silu
            b_dgate = b_du * b_x * b_slope
        o_out = o_row[:, None] * V + o_v
        tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        tl.store(p_dgate + o_out, b_dgate.to(p_dgate.dtype.element_ty), mask=mask)
    if SHARED_WEIGHT:
        tl.store(p_partials + i_program.to(tl.int64) * V + o_v, tl.sum(b_dweight, axis=0), mask=m_v)
    else:
        p_lines = p_partials + o_line.to(tl.int64)[:, None] * V + o_v
        tl.store(p_lines, b_dweight, mask=(o_line >= 0)[:, None] & m_v)


def backward(
    grads: list[Tensor], x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool
) -> list[Tensor]:
    """Gradients of x, gate and weight, in their dtypes."""
    dy = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
    dx, dgate = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate))
    B, T, H, V = x.shape
    rows = B * T * H
    if not x.numel():
        return [dx, dgate, torch.zeros_like(weight, memory_format=torch.contiguous_format)]
    shared = weight.ndim == 1 or H == 1
    BR, BV, num_warps = _WIDE if V > _MAX_KEPT_WIDTH else config(V, _ELEMENTS)
    tiles = triton.cdiv(rows, BR)
    whole = H // math.gcd(H, BR)  # programs that take whole tokens
    programs = max(min(tiles, _WARPS // num_warps) // whole, 1) * whole
    partials = x.new_empty((programs if shared else programs * BR, V), dtype=torch.float32)
    strides = dy.stride()[:3], x.stride()[:3], gate.stride()[:3], 0 if shared else weight.stride(0)
    options = {"V": V, "NORM_BEFORE_GATE": norm_before_gate, "PRECISE": x.dtype == torch.float32, "BV": BV}
    norm = None
    if BV < V:
        norm = x.new_empty((rows, 2), dtype=torch.float32)
        gated_rms_norm_bwd_kernel_norm[(rows,)](
            dy, x, gate, weight, norm, *strides, rows, T, H, eps, **options, num_warps=num_warps
        )
    gated_rms_norm_bwd_kernel_dx[(programs, triton.cdiv(V, BV))](
        dy,
        x,
        gate,
        weight,
        norm,
        dx,
        dgate,
        partials,
        *strides,
        rows,
        T,
        H,
        tiles,
        eps,
        shared,
        BR=BR,
        **options,
        num_warps=num_warps,
    )
    dweight = partials.sum(0) if shared else partials.view(-1, H, V).sum(0)
    return [dx, dgate, dweight.view(weight.shape).to(weight.dtype)]
