"""Absorbed latent attention in Triton, for any GPU: one launch, cut into pieces on the device.

All tiles are transposed, tokens or latents by query rows: tensor cores take 64 of the first and any few of the second,
so 16 heads cost the work of 16. A latent tile is loaded once and is the left operand of both products.

How the work is cut, and how pieces are merged: docs/mla_absorb.md.
"""

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.tickets import tickets
from hylo_ops.common.triton_gpu import ROOMY, is_nvidia_from, resources
from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2, starts_early
from hylo_ops.common.triton_math import PRECISION, begin_early, dot_type
from hylo_ops.mla_absorb import fp8
from hylo_ops.mla_absorb.triton_rows import latents_of, load_key_scales, load_keys, load_pages, load_tile, rows_at

# Scales of latents are about so far below 1 that a weight times one would have few bits left in fp16.
FP16_FACTOR = tl.constexpr(256.0)


@triton.jit
def window(p_lengths, p_starts, b, capacity, BN: tl.constexpr):
    """Positions of a sequence that count, and the multiple of BN that its tiles begin at."""
    end = tl.minimum(tl.load(p_lengths + b).to(tl.int32), capacity)
    start = end * 0
    if p_starts is not None:
        start = tl.maximum(tl.load(p_starts + b).to(tl.int32), 0)
    return start // BN * BN, start, end


@triton.jit
def unit_tokens(first, end, BN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """Tokens of a unit: of a tile, or (UNITS > 0) what cuts the sequence into UNITS at most and none below UNIT."""
    tokens = end * 0 + BN
    if UNITS > 0:
        tokens = tl.maximum(UNIT, tl.cdiv(tl.cdiv(end - first, UNITS), BN) * BN)
    return tokens


@triton.jit
def units_of(p_lengths, p_starts, b, mask, capacity, BN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr):
    """Units of sequences, 0 where masked; one of no tokens has a unit too, which writes its zeros."""
    end = tl.minimum(tl.load(p_lengths + b, mask=mask, other=0).to(tl.int32), capacity)
    first = end * 0
    if p_starts is not None:
        first = tl.maximum(tl.load(p_starts + b, mask=mask, other=0).to(tl.int32), 0) // BN * BN
    units = tl.cdiv(tl.maximum(end - first, 1), unit_tokens(first, end, BN, UNIT, UNITS))
    return tl.where(mask, units, 0)


@triton.jit
def count_units(
    p_lengths, p_starts, B, capacity, BB: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr
):
    total = 0
    for i in range(0, B, BB):
        o_b = i + tl.arange(0, BB)
        total += tl.sum(units_of(p_lengths, p_starts, o_b, o_b < B, capacity, BN, UNIT, UNITS))
    return total


@triton.jit
def find_unit(
    p_lengths, p_starts, B, capacity, unit, BB: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr
):
    """The sequence that has a unit, and that sequence's first one."""
    b, first, passed = 0, 0, 0
    for i in range(0, B, BB):
        o_b = i + tl.arange(0, BB)
        b_units = units_of(p_lengths, p_starts, o_b, o_b < B, capacity, BN, UNIT, UNITS)
        b_ends = passed + tl.cumsum(b_units)
        m_before = (o_b < B) & (b_ends <= unit)
        b += tl.sum(m_before.to(tl.int32))
        first = tl.maximum(first, tl.max(tl.where(m_before, b_ends, 0)))
        passed += tl.sum(b_units)
    return b, first


@triton.jit
def zeros_of(WIDTHS: tl.constexpr, BM: tl.constexpr):
    b_zeros = ()
    for i in tl.static_range(len(WIDTHS)):
        b_zeros += (tl.full([WIDTHS[i], BM], 0.0, dtype=tl.float32),)
    return b_zeros


@triton.jit
def load_queries(p_q, o_m, m_m, first, width, BW: tl.constexpr, DOT: tl.constexpr):
    """[BW, BM]: columns first.. of the query rows at the offsets o_m."""
    o_w = first + tl.arange(0, BW)
    m_q = (o_w < width)[:, None] & m_m[None, :]
    return tl.load(p_q + o_m[None, :] + o_w[:, None], mask=m_q, other=0.0).to(DOT)


@triton.jit
def attend(
    b_q,
    b_q_rope,
    b_heads,
    b_limit,
    p_cache,
    p_scales,
    p_pages,
    begin,
    stop,
    start,
    end,
    scale,
    cache_strides,
    scale_strides,
    HK: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTHS: tl.constexpr,
    BE: tl.constexpr,
    BHK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_SCALES: tl.constexpr,
    DOT: tl.constexpr,
    LATENT_SCALES_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_E4M3: tl.constexpr,
):
    """Running maximum [BM], sum [BM] and weighted latents [R, BM] over the positions begin..stop.

    A tile in fp8 is loaded and converted while the one before it is attended to. Then both products read what was
    converted once; Triton's own pipeline would convert it for each.
    """
    IS_FP8: tl.constexpr = LATENT_SCALES_AT > 0
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sums = tl.zeros([BN, BM], dtype=tl.float32)
    b_o = zeros_of(WIDTHS, BM)
    page = load_pages(p_pages, begin, start, end, PAGE, BN) if PAGE > 0 else begin.to(tl.int64) * 0
    if IS_FP8:
        b_bits, b_c, b_rope, b_ks = load_tile(
            p_cache,
            p_scales,
            page,
            begin + tl.arange(0, BN),
            start,
            end,
            cache_strides,
            scale_strides,
            HK,
            R,
            E,
            PAGE,
            WIDTHS,
            BE,
            BHK,
            ALIGN,
            ALIGN_SCALES,
            LATENT_SCALES_AT,
            ROPE_AT,
            ROPE,
        )
        b_k = latents_of(b_bits, WIDTHS, DOT, HAS_E4M3)
        if PAGE > 0:
            page = load_pages(p_pages, begin + BN, start, end, PAGE, BN)
    for i_s in range(begin, stop, BN):
        o_s = i_s + tl.arange(0, BN)
        m_s = (o_s >= start) & (o_s < end)
        if IS_FP8:
            b_bits, b_next_c, b_next_rope, b_next_ks = load_tile(
                p_cache,
                p_scales,
                page,
                i_s + BN + tl.arange(0, BN),
                start,
                end,
                cache_strides,
                scale_strides,
                HK,
                R,
                E,
                PAGE,
                WIDTHS,
                BE,
                BHK,
                ALIGN,
                ALIGN_SCALES,
                LATENT_SCALES_AT,
                ROPE_AT,
                ROPE,
            )
        else:
            p_row = rows_at(p_cache, page, o_s, cache_strides, PAGE, ALIGN)
            b_k = ()
        b_s = tl.zeros([BN, BM], dtype=tl.float32)
        at = 0
        for i in tl.static_range(len(WIDTHS)):
            # [BN, BR] @ [BR, BM]
            if IS_FP8:
                b_s += tl.dot(b_k[i], b_q[i], input_precision=PRECISION) * b_c[i][:, None]
            else:
                b_k += (load_keys(p_row, m_s, at, R, WIDTHS[i]).to(DOT),)
                b_s = tl.dot(b_k[i], b_q[i], b_s, input_precision=PRECISION)
            at += WIDTHS[i]
        if E > 0:
            if not IS_FP8:
                b_rope = load_keys(p_row + R, m_s, 0, E, BE)
            b_s = tl.dot(b_rope.to(DOT), b_q_rope, b_s, input_precision=PRECISION)
        b_s *= scale
        if p_scales is not None:
            if not IS_FP8:
                p_ks = rows_at(p_scales, page, o_s, scale_strides, PAGE, ALIGN_SCALES)
                b_ks = load_key_scales(p_ks, m_s, scale_strides[2], HK, BHK)
            # A product with ones and zeros copies a scale to its heads, and its loads run ahead like the keys'.
            b_s *= tl.dot(b_ks.to(b_heads.dtype), b_heads, input_precision=PRECISION)
        if PAGE > 0:
            # Of the next tile to be loaded, a whole tile ahead of the loads that wait for it.
            page = load_pages(p_pages, i_s + (2 * BN if IS_FP8 else BN), start, end, PAGE, BN)

        m_seen = m_s[:, None] & (o_s[:, None] < b_limit[None, :])
        b_s = tl.where(m_seen, b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 0))
        b_point = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf minus -inf would be NaN
        b_kept = tl.exp(b_top - b_point)
        b_p = tl.exp(b_s - b_point[None, :])
        b_sums = b_sums * b_kept[None, :] + b_p
        b_sum_o = ()
        for i in tl.static_range(len(WIDTHS)):
            b_w = b_p
            if IS_FP8:
                b_w *= (b_c[i] * FP16_FACTOR)[:, None]
            # [BR, BN] @ [BN, BM]
            b_sum_o += (tl.dot(tl.trans(b_k[i]), b_w.to(DOT), b_o[i] * b_kept[None, :], input_precision=PRECISION),)
        b_o = b_sum_o
        b_top = b_new
        if IS_FP8:
            b_k = latents_of(b_bits, WIDTHS, DOT, HAS_E4M3)
            b_c, b_rope, b_ks = b_next_c, b_next_rope, b_next_ks
    if IS_FP8:
        b_sum_o = ()
        for i in tl.static_range(len(WIDTHS)):
            b_sum_o += (b_o[i] / FP16_FACTOR,)
        b_o = b_sum_o
    return b_top, tl.sum(b_sums, 0), b_o


@triton.jit
def store_partial(p_partial, b_top, b_total, b_o, R: tl.constexpr, WIDTHS: tl.constexpr, BM: tl.constexpr):
    o_m = tl.arange(0, BM)
    at = 0
    for i in tl.static_range(len(WIDTHS)):
        o_r = at + tl.arange(0, WIDTHS[i])
        tl.store(p_partial + o_r[:, None] * BM + o_m[None, :], b_o[i], mask=(o_r < R)[:, None])
        at += WIDTHS[i]
    tl.store(p_partial + R * BM + o_m, b_top)
    tl.store(p_partial + (R + 1) * BM + o_m, b_total)


@triton.jit
def store_result(p_o, p_lse, o_m, m_m, b_top, b_total, b_o, R: tl.constexpr, WIDTHS: tl.constexpr):
    b_total = tl.where(b_total == 0.0, 1.0, b_total)  # of a row that sees nothing: zeros, and lse is b_top, -inf
    b_inverse = 1.0 / b_total
    tl.store(p_lse + o_m, b_top + tl.log(b_total), mask=m_m)
    at = 0
    for i in tl.static_range(len(WIDTHS)):
        o_r = at + tl.arange(0, WIDTHS[i])
        m_o = (o_r < R)[:, None] & m_m[None, :]
        b_out = b_o[i] * b_inverse[None, :]
        tl.store(p_o + o_m[None, :].to(tl.int64) * R + o_r[:, None], b_out.to(p_o.dtype.element_ty), mask=m_o)
        at += WIDTHS[i]


@triton.jit
def merge(p_partial, count, stride, R: tl.constexpr, WIDTHS: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr):
    """Of `count` partial results in their order, whichever came last."""
    o_m = tl.arange(0, BM)
    b_top = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_total = tl.zeros([BM], dtype=tl.float32)
    b_o = zeros_of(WIDTHS, BM)
    for i in tl.range(0, count, num_stages=STAGES):
        p_one = p_partial + i * stride
        b_one_top = tl.load(p_one + R * BM + o_m, cache_modifier=".cg")
        b_one_total = tl.load(p_one + (R + 1) * BM + o_m, cache_modifier=".cg")
        b_new = tl.maximum(b_top, b_one_top)
        b_point = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_kept = tl.exp(b_top - b_point)
        b_weight = tl.exp(b_one_top - b_point)
        b_total = b_total * b_kept + b_one_total * b_weight
        b_sum_o = ()
        at = 0
        for w in tl.static_range(len(WIDTHS)):
            o_r = at + tl.arange(0, WIDTHS[w])
            p_oc = p_one + o_r[:, None] * BM + o_m[None, :]
            b_one = tl.load(p_oc, mask=(o_r < R)[:, None], other=0.0, cache_modifier=".cg")
            b_sum_o += (b_o[w] * b_kept[None, :] + b_one * b_weight[None, :],)
            at += WIDTHS[w]
        b_o = b_sum_o
        b_top = b_new
    return b_top, b_total, b_o


@triton.jit
def is_last(p_ticket, count):
    """Whether all others of `count` have drawn before; the last one leaves zero behind, for the next launch."""
    tl.debug_barrier()  # what all threads wrote comes before the ticket of one
    last = count == 1
    if count > 1:
        last = tl.atomic_add(p_ticket, 1, sem="acq_rel") == count - 1
        if last:
            tl.store(p_ticket, 0)
    return last


# One kernel whatever the batch and its cache: another would take seconds to compile, and its bits need not be the same.
@triton.jit(do_not_specialize=["B", "capacity", "programs", "slots", "table_stride"])
def mla_absorb_fwd_kernel_decode(
    p_q_nope,
    p_q_rope,
    p_cache,
    p_scales,
    p_lengths,
    p_starts,
    p_table,
    p_o,
    p_lse,
    p_partial,
    p_tickets,
    scale,
    B,
    T,
    capacity,
    programs,
    slots,
    q_nope_strides,
    q_rope_strides,
    cache_strides,
    scale_strides,
    table_stride,
    H: tl.constexpr,
    HK: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTHS: tl.constexpr,
    BE: tl.constexpr,
    BHK: tl.constexpr,
    BB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_SCALES: tl.constexpr,
    LEAST: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    DOT: tl.constexpr,
    DOT_SCALES: tl.constexpr,
    LATENT_SCALES_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per tile of query rows and share of all units; a share is cut into pieces where a sequence ends."""
    begin_early(EARLY)
    rows = T * H
    tiles = tl.cdiv(rows, BM)
    i_tile = tl.program_id(0) % tiles
    i_share = tl.program_id(0) // tiles
    total = count_units(p_lengths, p_starts, B, capacity, BB, BN, UNIT, UNITS)
    share = tl.cdiv(total, programs)
    if UNITS == 0:
        share = tl.maximum(share, LEAST // BN)
    unit = i_share * share
    last_unit = tl.minimum(unit + share, total)
    if unit >= last_unit:
        return

    o_m = i_tile * BM + tl.arange(0, BM)
    m_m = o_m < rows
    o_t = o_m // H
    o_h = o_m % H
    b_heads = 0
    if p_scales is not None:
        b_heads = (tl.arange(0, BHK)[:, None] == (o_h // (H // HK))[None, :]).to(DOT_SCALES)
    size = (R + 2) * BM

    b, first_unit = find_unit(p_lengths, p_starts, B, capacity, unit, BB, BN, UNIT, UNITS)
    while unit < last_unit:
        i_b = tl.cast(b, tl.int64)
        first, start, end = window(p_lengths, p_starts, i_b, capacity, BN)
        tokens = unit_tokens(first, end, BN, UNIT, UNITS)
        units = tl.cdiv(tl.maximum(end - first, 1), tokens)
        if UNITS == 0:
            next_unit = tl.minimum(first_unit + units, last_unit)
            i_piece = i_share - first_unit // share
            pieces = (first_unit + units - 1) // share - first_unit // share + 1
            slot = first_unit // share + b
        else:
            next_unit = unit + 1
            i_piece = unit - first_unit
            pieces = units
            slot = first_unit
        begin = first + (unit - first_unit) * tokens
        stop = tl.minimum(first + (next_unit - first_unit) * tokens, end)

        p_qb = p_q_nope + i_b * q_nope_strides[0]
        o_q = o_t.to(tl.int64) * q_nope_strides[1] + o_h * q_nope_strides[2]
        b_q = ()
        at = 0
        for i in tl.static_range(len(WIDTHS)):
            b_q += (load_queries(p_qb, o_q, m_m, at, R, WIDTHS[i], DOT),)
            at += WIDTHS[i]
        b_q_rope = 0
        if E > 0:
            o_q = o_t.to(tl.int64) * q_rope_strides[1] + o_h * q_rope_strides[2]
            b_q_rope = load_queries(p_q_rope + i_b * q_rope_strides[0], o_q, m_m, 0, E, BE, DOT)
        b_limit = end + o_m * 0
        if CAUSAL:
            b_limit = end - T + 1 + o_t
        p_pages = p_table
        p_cached = p_cache
        p_scaled = p_scales
        if p_table is None:
            p_cached += i_b * (cache_strides[0] * ALIGN)
            if p_scales is not None:
                p_scaled += i_b * (scale_strides[0] * ALIGN_SCALES)
        else:
            p_pages += i_b * table_stride
        b_top, b_total, b_o = attend(
            b_q,
            b_q_rope,
            b_heads,
            b_limit,
            p_cached,
            p_scaled,
            p_pages,
            begin,
            stop,
            start,
            end,
            scale,
            cache_strides,
            scale_strides,
            HK,
            R,
            E,
            PAGE,
            WIDTHS,
            BE,
            BHK,
            BM,
            BN,
            ALIGN,
            ALIGN_SCALES,
            DOT,
            LATENT_SCALES_AT,
            ROPE_AT,
            p_q_nope.dtype.element_ty,
            HAS_E4M3,
        )

        p_ob = p_o + i_b * rows * R
        p_lb = p_lse + i_b * rows
        is_whole = pieces == 1
        if p_partial is not None:
            at_slot = i_tile.to(tl.int64) * slots + slot
            p_first = p_partial + at_slot * size
            step = at_slot * 0 + 1
            level = 0
            group = tl.where(pieces > GROUP * GROUP, 2 * GROUP, GROUP)
            while pieces > 1:
                # Groups of pieces are merged, then groups of groups. A ticket of round `level` lies that far behind
                # the group's first slot, where no other round has one, as a group is larger.
                store_partial(p_first + i_piece * step * size, b_top, b_total, b_o, R, WIDTHS, BM)
                leader = i_piece // group * group
                members = tl.minimum(pieces - leader, group)
                if is_last(p_tickets + at_slot + leader * step + level, members):
                    p_group = p_first + leader * step * size
                    b_top, b_total, b_o = merge(p_group, members, step * size, R, WIDTHS, BM, MERGE_STAGES)
                    tl.debug_barrier()  # what all threads have read may be overwritten
                    pieces = tl.cdiv(pieces, group)
                    is_whole = pieces == 1
                else:
                    pieces = 0
                i_piece = i_piece // group
                step *= group
                level += 1
        if is_whole:
            store_result(p_ob, p_lb, o_m, m_m, b_top, b_total, b_o, R, WIDTHS)
        if next_unit == first_unit + units:
            b += 1
            first_unit = next_unit
        unit = next_unit


@dataclass(frozen=True)
class Config:
    """Tiles and shares of one kind of problem.

    Args:
        rows: query rows (tokens times heads) of a tile at most, a power of two from 16.
        tokens: cached tokens of a tile; tensor cores of Hopper take 64.
        programs: how many share a multiprocessor, so how the work is cut.
        merge_stages: pieces on their way into shared memory while one is merged, and that one.
        least: tokens of a share at least: fewer cost more to merge than they save.
        group: pieces that one program merges, a power of two from 4; more are merged in rounds, and twice as many by
            one where there would be three rounds.
    """

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int
    merge_stages: int
    least: int = 128
    group: int = 8


# Fixed split: a sequence is cut by its own length alone.
_FIXED_TOKENS = 512
_FIXED_UNITS = 64

_FEW, _MANY = 128, 1024  # sequences whose lengths a program looks at together
_LEAST_SIDE = 16  # of a product's operand
_WIDEST = (
    16  # elements: strides are passed in units of their common divisor, which Triton needs to read 16 bytes at once
)
_WIDEST_TILE = 128


def config_for(R: int, E: int, rows: int, dtype: torch.dtype, is_fp8: bool, shared_bytes: int) -> Config:
    """By compiling for sm_90: no tile is spilled; up to R 256, or with 16 rows, two programs share a multiprocessor."""
    if shared_bytes < ROOMY and (R + E > 320 or dtype == torch.float32):
        return Config(_LEAST_SIDE, 16 if dtype == torch.float32 else 32, 8, 1, 1, 1)
    BM = min(max(next_power_of_2(rows), _LEAST_SIDE), 32)
    if dtype == torch.float32:
        return Config(_LEAST_SIDE, 32, 8 if R > 128 else 4, 2, 1, 2)
    if is_fp8 and (R > 128 or (R > 32 and E > 0 and max(next_power_of_2(E), _LEAST_SIDE) != BM)):
        # A thread holds some of the next tile, too: small ones, two programs for all R. Up to 128 they keep clear of a
        # fault of ptxas 12.8, which comes with Triton 3.6 (12.9 has none): tiles of 64 tokens are multiplied by wgmma,
        # whose descriptors say where an operand lies and how. Weights lie where rope lay, and where they are not as
        # wide as rope the two descriptors differ in their upper halves alone; then ptxas loses the lower half of all
        # but the first of the weights'. Smaller tiles of rope need no descriptors.
        return Config(BM if R <= 256 else _LEAST_SIDE, 32, 4, 1, 2, 2)
    if R > 256:
        return Config(BM, 32, 4, 3, 2, 1) if BM == _LEAST_SIDE else Config(BM, 64, 8, 2, 1, 4)
    if R > 128:
        return Config(BM, 64, 4, 2, 2, 4 if BM == _LEAST_SIDE else 2)
    return Config(BM, 64, 4, 3, 2, 4)


def widths_for(R: int) -> tuple[int, ...]:
    """Powers of two that hold R, each a tile: multiples of 64, which Hopper's tensor cores take, or one of less.

    None is wider than 128: equal tiles share the addresses that a thread keeps in registers.
    """
    if R <= 64:
        return (max(next_power_of_2(R), _LEAST_SIDE),)
    padded = ceil_div(R, 64) * 64
    return (_WIDEST_TILE,) * (padded // _WIDEST_TILE) + (64,) * (padded % _WIDEST_TILE > 0)


@dataclass(frozen=True)
class _Plan:
    """What of a launch depends on sizes alone."""

    tiles: int
    programs: int
    slots: int
    workspace: int  # numbers in float32
    constants: tuple[Hashable, ...]
    warps: int
    stages: int
    early: bool


@functools.lru_cache(4096)
def _plan(
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    aligns: tuple[int, int],
    causal: bool,
    fixed_split: bool,
    device: torch.device,
    config: Config | None,
) -> _Plan:
    B, T, H, HK, R, E, page, capacity = sizes
    dot, scales_dtype, cache_dtype = dtypes
    is_fp8 = cache_dtype == fp8.BYTES
    (multiprocessors, shared_bytes), early = resources(device), starts_early()
    c = config or config_for(R, E, T * H, dot, is_fp8, shared_bytes)
    BM, widths = c.rows, widths_for(R)
    tiles = ceil_div(T * H, BM)
    programs = max(c.programs * multiprocessors // tiles, 1)
    if fixed_split:
        units = max(_FIXED_UNITS // tiles, 1)
        slots = B * max(min(ceil_div(capacity, _FIXED_TOKENS), units), 1)
        programs = min(programs, slots)
    else:
        units = 0
        most = B * max(ceil_div(capacity, c.tokens), 1)
        programs = min(programs, ceil_div(most, c.least // c.tokens))
        slots = programs + B
    is_cut = units != 1 and (units > 0 or programs > 1)
    constants = (
        H,
        HK,
        R,
        E,
        page,
        causal,
        widths,
        max(next_power_of_2(E), _LEAST_SIDE),
        max(next_power_of_2(HK), _LEAST_SIDE),
        _FEW if B <= _FEW else _MANY,
        BM,
        c.tokens,
        c.merge_stages,
        *aligns,
        c.least,
        _FIXED_TOKENS,
        units,
        c.group,
        dot_type(dot),
        dot_type(scales_dtype),
        *(fp8.offsets(R) if is_fp8 else (0, 0)),
        is_fp8 and _has_e4m3(),
        early,
    )
    workspace = tiles * slots * (R + 2) * BM if is_cut else 0
    return _Plan(tiles, programs, slots, workspace, constants, c.warps, c.stages, early)


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    scale: float,
    causal: bool,
    fixed_split: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's forward; widths are contiguous, all else may be strided."""
    (B, T, H, R), E, dtype = q_nope.shape, q_rope.shape[3], q_nope.dtype
    o, lse = q_nope.new_empty(B, T, H, R), q_nope.new_empty(B, T, H, dtype=torch.float32)
    if not lse.numel():
        return o, lse
    page = 0 if block_table is None else kv_cache.shape[1]
    capacity = kv_cache.shape[1] if block_table is None else block_table.shape[1] * page
    outer, token, _ = kv_cache.stride()
    align = math.gcd(outer, token, _WIDEST)
    HK, align_scales, scale_strides, scales_dtype = 1, 1, (0, 0, 0), dtype
    if key_scale is not None:
        HK, scales_dtype = key_scale.shape[2], key_scale.dtype
        scales_outer, scales_token, scales_head = key_scale.stride()
        align_scales = math.gcd(scales_outer, scales_token, _WIDEST)
        scale_strides = (scales_outer // align_scales, scales_token // align_scales, scales_head)
    plan = _plan(
        (B, T, H, HK, R, E, page, capacity),
        (dtype if kv_cache.dtype in (dtype, fp8.BYTES) else torch.float32, scales_dtype, kv_cache.dtype),
        (align, align_scales),
        causal,
        fixed_split,
        q_nope.device,
        config,
    )
    launch(
        mla_absorb_fwd_kernel_decode,
        (plan.tiles * plan.programs, 1, 1),
        (
            q_nope,
            q_rope if E else None,
            kv_cache,
            key_scale,
            cache_seqlens,
            cache_starts,
            block_table,
            o,
            lse,
            lse.new_empty(plan.workspace) if plan.workspace else None,
            tickets(plan.tiles * plan.slots, q_nope.device) if plan.workspace else None,
        ),
        (
            scale,
            B,
            T,
            capacity,
            plan.programs,
            plan.slots,
            q_nope.stride()[:3],
            q_rope.stride()[:3] if E else (0, 0, 0),
            (outer // align, token // align),
            scale_strides,
            0 if block_table is None else block_table.stride(0),
        ),
        plan.constants,
        plan.warps,
        plan.stages,
        plan.early,
    )
    return o, lse


def _has_e4m3() -> bool:
    """Whether the current GPU converts from e4m3 itself."""
    return is_nvidia_from(89)
