"""Products of few rows in Triton: one launch that reads the weights once, cut along K until all of a GPU takes part.

Rows of the weights are the side of a product that tensor cores take 64 of; the few rows of x are the other, which may
be as short as 16. How the work is cut, and what begins early: docs/skinny_linear.md.
"""

import functools
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.tickets import tickets
from hylo_ops.common.triton_gpu import resources
from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2, starts_early
from hylo_ops.common.triton_math import dot_type
from hylo_ops.common.triton_rows import silu


@triton.jit
def prefetch_rows(p_rows, first, K, LINES: tl.constexpr):
    """Brings what rows begin with at column `first`, so many lines of 128 bytes of each, into the second cache."""
    o_k = tl.minimum(first + tl.arange(0, LINES) * 64, K - 1)
    p_lines = (p_rows + o_k[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0", "=r,l", [p_lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def store_result(
    b_acc, p_y, i_tile, o_b, B, N, y_stride, ADD: tl.constexpr, SWIGLU: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr
):
    """From sums [BN, BB]; with SWIGLU the first half of the rows is the gate's."""
    COLUMNS: tl.constexpr = BN // 2 if SWIGLU else BN
    if SWIGLU:
        b_gate, b_up = tl.split(tl.permute(tl.reshape(b_acc, [2, COLUMNS, BB]), [1, 2, 0]))
        b_y = silu(b_gate, False) * b_up
    else:
        b_y = b_acc
    o_n = i_tile * COLUMNS + tl.arange(0, COLUMNS)
    mask = (o_n < N)[:, None] & (o_b < B)[None, :]
    p_out = p_y + o_b.to(tl.int64)[None, :] * y_stride + o_n[:, None]
    if ADD:
        b_y += tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=mask)


# One kernel for all numbers of rows that a tile holds.
@triton.jit(do_not_specialize=["B"])
def skinny_linear_fwd_kernel_y(
    p_x,
    p_weight,
    p_y,
    p_partial,
    p_tickets,
    B,
    N,
    K,
    x_stride,
    weight_stride,
    y_stride,
    ADD: tl.constexpr,
    SWIGLU: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
    LINES: tl.constexpr,
    DOT: tl.constexpr,
):
    i_tile, i_part = tl.program_id(0), tl.program_id(1)
    steps = tl.cdiv(K, BK)
    first = steps * i_part // SPLIT
    last = steps * (i_part + 1) // SPLIT
    o_i, o_b = tl.arange(0, BN), tl.arange(0, BB)
    if SWIGLU:  # rows of the gate, and those of up that belong to them
        o_n = i_tile * (BN // 2) + o_i % (BN // 2)
        o_w = o_n + o_i // (BN // 2) * N
    else:
        o_n = i_tile * BN + o_i
        o_w = o_n
    m_n, m_b = o_n < N, o_b < B
    p_rows = p_weight + tl.where(m_n, o_w, 0).to(tl.int64)[:, None] * weight_stride
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if LINES > 0:
            prefetch_rows(p_rows, first * BK, K, LINES)
        tl.extra.cuda.gdc_wait()

    p_few = p_x + o_b.to(tl.int64)[:, None] * x_stride
    b_acc = tl.zeros([BN, BB], dtype=tl.float32)
    for i_k in range(first, last):
        o_k = i_k * BK + tl.arange(0, BK)
        m_k = o_k < K
        m_w = m_n[:, None] & m_k[None, :]
        b_w = tl.load(p_rows + o_k[None, :], mask=m_w, other=0.0).to(DOT)
        b_x = tl.load(p_few + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0).to(DOT)
        # [BN, BK] @ [BK, BB] -> [BN, BB]
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc)

    if SPLIT == 1:
        store_result(b_acc, p_y, i_tile, o_b, B, N, y_stride, ADD, SWIGLU, BN, BB)
    else:
        p_parts = p_partial + i_tile.to(tl.int64) * (SPLIT * BN * BB) + o_i[:, None] * BB + o_b[None, :]
        tl.store(p_parts + i_part * (BN * BB), b_acc)
        tl.debug_barrier()  # what all threads wrote comes before the ticket of one
        if tl.atomic_add(p_tickets + i_tile, 1, sem="acq_rel") == SPLIT - 1:
            # In the parts' order, whoever comes last: the same bits each time.
            b_sum = tl.load(p_parts, cache_modifier=".cg")
            for i in tl.static_range(1, SPLIT):
                b_sum += tl.load(p_parts + i * (BN * BB), cache_modifier=".cg")
            store_result(b_sum, p_y, i_tile, o_b, B, N, y_stride, ADD, SWIGLU, BN, BB)
            tl.store(p_tickets + i_tile, 0)  # for the next launch


_LEAST_SIDE = 16  # of a product's operand
_PROGRAMS = 2  # that share a multiprocessor
_MOST_STAGES = 4
_LEAST_DEPTH = 256  # of K that a part has
_MOST_PARTS = 8
_BEGINNING = 128  # what it takes until a program's first weights are there, in columns that it could read meanwhile
_PREFETCHED = 1 << 16  # bytes that a program asks for before its turn
_LINE = 128
_RESERVED = 1 << 10  # bytes of shared memory of a program that are not its own


@dataclass(frozen=True)
class Config:
    """Tiles of BN rows of the weights, BB of x and BK columns of both, parts of K, and how a program runs."""

    BN: int
    BB: int
    BK: int
    parts: int
    warps: int
    stages: int


def config_for(B: int, rows: int, K: int, multiprocessors: int, shared_bytes: int) -> Config:
    """For `rows` of the weights, of 16 bits.

    64 rows of x would be read from the second cache as often as the weights, if tiles had not twice the rows there.
    """
    BB = max(next_power_of_2(B), _LEAST_SIDE)
    BN, BK = (128, 64) if BB > 32 else (64, 128)
    room = shared_bytes // _PROGRAMS - _RESERVED
    stages = min(max(room // (2 * BK * (BN + BB)), 2), _MOST_STAGES)
    tiles, slots = ceil_div(rows, BN), _PROGRAMS * multiprocessors

    def columns(parts: int) -> float:
        """What all of it takes, as columns of the weights that a program reads: turns, and the last one's sums."""
        return ceil_div(tiles * parts, slots) * (K / parts + _BEGINNING) + 2 * BB * parts

    return Config(BN, BB, BK, min(range(1, max(min(K // _LEAST_DEPTH, _MOST_PARTS), 1) + 1), key=columns), 4, stages)


@dataclass(frozen=True)
class _Plan:
    """What of a launch depends on sizes alone."""

    tiles: int
    parts: int
    workspace: int  # numbers in float32
    constants: tuple[Hashable, ...]
    warps: int
    stages: int
    early: bool


@functools.lru_cache(4096)
def _plan(
    B: int,
    N: int,
    K: int,
    add: bool,
    swiglu: bool,
    constant: bool,
    dtype: torch.dtype,
    device: torch.device,
    config: Config | None,
) -> _Plan:
    rows = 2 * N if swiglu else N
    c = config or config_for(B, rows, K, *resources(device))
    tiles, early = ceil_div(rows, c.BN), starts_early()
    lines = _PREFETCHED // (_LINE * c.BN) if constant and early else 0
    return _Plan(
        tiles,
        c.parts,
        tiles * c.parts * c.BN * c.BB if c.parts > 1 else 0,
        (add, swiglu, c.BN, c.BB, c.BK, c.parts, early, lines, dot_type(dtype)),
        c.warps,
        c.stages,
        early,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    swiglu: bool,
    constant: bool,
    config: Config | None = None,
) -> Tensor:
    """y, or `residual` with the product added; rows of all may be strided, those of x in any way."""
    K, N = x.shape[-1], weight.shape[0] // (2 if swiglu else 1)
    y = x.new_empty((*x.shape[:-1], N)) if residual is None else residual
    if not y.numel():
        return y
    few = x.reshape(-1, K)
    if few.stride(1) != 1:
        few = few.contiguous()
    out = y.view(-1, N)
    plan = _plan(len(few), N, K, residual is not None, swiglu, constant, x.dtype, x.device, config)
    launch(
        skinny_linear_fwd_kernel_y,
        (plan.tiles, plan.parts, 1),
        (
            few,
            weight,
            out,
            x.new_empty(plan.workspace, dtype=torch.float32) if plan.workspace else None,
            tickets(plan.tiles, x.device) if plan.workspace else None,
        ),
        (len(few), N, K, few.stride(0), weight.stride(0), out.stride(0)),
        plan.constants,
        plan.warps,
        plan.stages,
        plan.early,
    )
    return y
