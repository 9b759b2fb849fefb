"""Backward of the RMS norm in Triton: gradients of the total and of x, and parts of the weight's, out of one pass.

A fixed number of programs walk over tiles of rows, the next rows on their way through shared memory meanwhile, and keep
what the weight gains in registers: docs/rms_norm.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.common.triton_rows import as_rows, config, load_rows, rows_of

_MULTIPROCESSORS = 132  # of an H100 or H200; a constant, since the weight's gradient depends on the number of programs
_WARPS = 24  # of one's programs: all of them are there at once, so that none waits for a second turn
_ELEMENTS = 8  # of a thread
_MOST_WARPS = 16  # of a program: 32 leave a thread 64 registers
_STAGES = 3


@triton.jit
def rms_norm_bwd_kernel_dx(
    p_dy,
    p_total,
    p_weight,
    p_rstd,
    p_dtotal,
    p_d,
    p_dx,
    p_partials,
    total_strides,
    rows,
    tokens,
    heads,
    tiles,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    p_w = p_weight + tl.zeros([BR, 1], dtype=tl.int32) + o_d
    b_weight = tl.load(p_w, mask=tl.full([BR, 1], True, dtype=tl.int1) & m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BR, BD], dtype=tl.float32)
    for i_tile in tl.range(i_program, tiles, tl.num_programs(0), num_stages=STAGES):
        m_row, o_row, place = rows_of(i_tile, rows, tokens, heads, BR)
        mask = m_row[:, None] & m_d
        o_out = o_row[:, None] * D + o_d
        rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
        b_n = load_rows(p_total, total_strides, place, o_d, mask) * rstd
        b_dy = tl.load(p_dy + o_out, mask=mask, other=0.0).to(tl.float32)
        b_dweight += b_dy * b_n
        b_dn = b_dy * b_weight
        pull = tl.sum(b_n * b_dn, axis=1)[:, None] * (1.0 / D)
        b_d = (b_dn - b_n * pull) * rstd
        if p_dtotal is not None:
            b_d += tl.load(p_dtotal + o_out, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_d + o_out, b_d.to(p_d.dtype.element_ty), mask=mask)
        if p_dx is not None:
            tl.store(p_dx + o_out, b_d.to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_partials + i_program.to(tl.int64) * D + o_d, tl.sum(b_dweight, axis=0), mask=m_d)


def backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the total, of x (of no size where that is the same), and of the weight."""
    D, rows = total.shape[-1], rstd.numel()
    d_total = torch.empty_like(total, memory_format=torch.contiguous_format)
    dx = None if x_dtype == total.dtype else torch.empty_like(d_total, dtype=x_dtype)
    nothing = total.new_empty(0, dtype=x_dtype)
    if not rows:
        return d_total, nothing if dx is None else dx, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    total, (_, tokens, heads), strides = as_rows(total)
    BR, BD, num_warps = config(D, _ELEMENTS, _MOST_WARPS)
    tiles = ceil_div(rows, BR)
    programs = min(tiles, _MULTIPROCESSORS * max(1, _WARPS // num_warps))
    partials = rstd.new_empty((programs, D))
    launch(
        rms_norm_bwd_kernel_dx,
        (programs, 1, 1),
        (
            dy.contiguous(),
            total,
            weight.contiguous(),
            rstd,
            None if dtotal is None else dtotal.contiguous(),
            d_total,
            dx,
            partials,
        ),
        (strides, rows, tokens, heads, tiles),
        (D, BR, BD, _STAGES),
        num_warps,
    )
    return d_total, nothing if dx is None else dx, partials.sum(0).to(weight.dtype)
