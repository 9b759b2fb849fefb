"""A decode step of latent attention in Triton, for any GPU: a launch before the attention's and one behind it.

Heads that read the same up-projection, of all sequences, are the rows of one product, so that its weights are read once
for a tile of them. What is rounded where: docs/mla_absorb.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2
from hylo_ops.common.triton_math import PRECISION, dot_type
from hylo_ops.fused.triton_mla import key_scales
from hylo_ops.mla_absorb import triton_decode as attention


@triton.jit
def product_tile(rows, BM: tl.constexpr, COLUMNS: tl.constexpr, BC: tl.constexpr):
    """Of this program: the head of the weights, the tile of rows, the first column."""
    i_tile = tl.program_id(0)
    NC: tl.constexpr = (COLUMNS + BC - 1) // BC
    tiles = tl.cdiv(rows, BM)
    return i_tile // (NC * tiles), i_tile // NC % tiles, i_tile % NC * BC


@triton.jit
def rows_of(i_m, i_g, rows, EACH: tl.constexpr, BM: tl.constexpr):
    """Sequence and head of a tile's rows, and which there are."""
    o_m = i_m * BM + tl.arange(0, BM)
    return (o_m // EACH).to(tl.int64), i_g * EACH + o_m % EACH, o_m < rows


@triton.jit
def rotated(p_first, p_second, p_cos, p_sin, m_first, m_angle, HALF: tl.constexpr):
    """(u1 | u2) cos + (-u2 | u1) sin as its two halves, in float32."""
    b_first = tl.load(p_first, mask=m_first, other=0.0).to(tl.float32)
    b_second = tl.load(p_second, mask=m_first, other=0.0).to(tl.float32)
    b_low = b_first * tl.load(p_cos, mask=m_angle, other=0.0).to(tl.float32)
    b_low -= b_second * tl.load(p_sin, mask=m_angle, other=0.0).to(tl.float32)
    b_high = b_second * tl.load(p_cos + HALF, mask=m_angle, other=0.0).to(tl.float32)
    b_high += b_first * tl.load(p_sin + HALF, mask=m_angle, other=0.0).to(tl.float32)
    return b_low, b_high


@triton.jit
def store_row(
    p_new,
    p_row,
    p_cos,
    p_sin,
    m_row,
    R: tl.constexpr,
    E: tl.constexpr,
    ROW: tl.constexpr,
    BROW: tl.constexpr,
    BE: tl.constexpr,
):
    """A new row into the cache: the latent and the rest as they are, the rope rotated."""
    o_c = tl.arange(0, BROW)
    m_c = m_row & (o_c < ROW) & ((o_c < R) | (o_c >= R + E))
    b_new = tl.load(p_new + o_c, mask=m_c, other=0.0)
    tl.store(p_row + o_c, b_new.to(p_row.dtype.element_ty), mask=m_c)
    if E > 0:
        o_e = tl.arange(0, BE)
        m_e = m_row & (o_e < E // 2)
        p_rope = p_new + R + o_e
        b_low, b_high = rotated(p_rope, p_rope + E // 2, p_cos + o_e, p_sin + o_e, m_e, m_e, E // 2)
        tl.store(p_row + R + o_e, b_low.to(p_row.dtype.element_ty), mask=m_e)
        tl.store(p_row + R + E // 2 + o_e, b_high.to(p_row.dtype.element_ty), mask=m_e)


@triton.jit
def rotate_queries(
    p_q, p_o, p_cos, p_sin, head_stride, H: tl.constexpr, E: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr
):
    """Of all heads of a sequence."""
    o_h = tl.arange(0, BH)[:, None]
    o_e = tl.arange(0, BE)[None, :]
    m_e = o_e < E // 2
    m_q = (o_h < H) & m_e
    p_first = p_q + o_h * head_stride + o_e
    b_low, b_high = rotated(p_first, p_first + E // 2, p_cos + o_e, p_sin + o_e, m_q, m_e, E // 2)
    p_low = p_o + o_h * E + o_e
    tl.store(p_low, b_low.to(p_o.dtype.element_ty), mask=m_q)
    tl.store(p_low + E // 2, b_high.to(p_o.dtype.element_ty), mask=m_q)


@triton.jit
def absorb_queries(
    p_q_nope,
    p_w_uk,
    p_q_latent,
    rows,
    q_strides,
    weight_strides,
    H: tl.constexpr,
    EACH: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of q_latent = q_nope w_uk."""
    i_g, i_m, first = product_tile(rows, BM, R, BR)
    o_b, o_h, m_m = rows_of(i_m, i_g, rows, EACH, BM)
    o_n = tl.arange(0, BN)
    o_r = first + tl.arange(0, BR)
    p_q = p_q_nope + (o_b * q_strides[0] + o_h * q_strides[1])[:, None] + o_n[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_n < NOPE)[None, :], other=0.0).to(DOT)
    p_w = p_w_uk + i_g.to(tl.int64) * weight_strides[0] + o_n[:, None] * weight_strides[1] + o_r[None, :]
    b_w = tl.load(p_w, mask=(o_n < NOPE)[:, None] & (o_r < R)[None, :], other=0.0).to(DOT)
    # [BM, BN] @ [BN, BR]
    b_latent = tl.dot(b_q, b_w, input_precision=PRECISION)
    p_latent = p_q_latent + ((o_b * H + o_h) * R)[:, None] + o_r[None, :]
    tl.store(p_latent, b_latent.to(p_q_latent.dtype.element_ty), mask=m_m[:, None] & (o_r < R)[None, :])


# One kernel whatever the batch and its cache: another would take seconds to compile.
@triton.jit(do_not_specialize=["B", "capacity", "table_stride"])
def mla_step_fwd_kernel_queries(
    p_q_nope,
    p_q_rope,
    p_new,
    p_w_uk,
    p_cache,
    p_lengths,
    p_position,
    p_cos,
    p_sin,
    p_table,
    p_q_latent,
    p_q_rotated,
    p_counts,
    B,
    capacity,
    q_nope_strides,
    q_rope_strides,
    new_stride,
    weight_strides,
    cache_strides,
    angle_strides,
    table_stride,
    H: tl.constexpr,
    EACH: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BH: tl.constexpr,
    BE: tl.constexpr,
    BROW: tl.constexpr,
    DOT: tl.constexpr,
):
    """Programs of the products q_nope w_uk, then one for each sequence: its row, its rotated queries, its tokens."""
    rows = B * EACH
    products = (H // EACH) * tl.cdiv(rows, BM) * ((R + BR - 1) // BR)
    if tl.program_id(0) < products:
        absorb_queries(
            p_q_nope, p_w_uk, p_q_latent, rows, q_nope_strides, weight_strides, H, EACH, NOPE, R, BM, BN, BR, DOT
        )
    else:
        i_b = (tl.program_id(0) - products).to(tl.int64)
        position = tl.load(p_position + i_b).to(tl.int64)
        length = tl.load(p_lengths + i_b).to(tl.int32)
        tl.store(p_counts + i_b, tl.where(position < 0, 0, length))  # padding sees nothing
        m_row = (position >= 0) & (position < capacity)
        outer, slot = i_b, position
        if p_table is not None:
            outer = tl.load(p_table + i_b * table_stride + position // PAGE, mask=m_row, other=0).to(tl.int64)
            slot = position % PAGE
        p_row = p_cache + outer * cache_strides[0] + slot * cache_strides[1]
        p_cos_b = p_cos + i_b * angle_strides[0]
        p_sin_b = p_sin + i_b * angle_strides[1]
        store_row(p_new + i_b * new_stride, p_row, p_cos_b, p_sin_b, m_row, R, E, ROW, BROW, BE)
        if E > 0:
            p_q = p_q_rope + i_b * q_rope_strides[0]
            rotate_queries(p_q, p_q_rotated + i_b * (H * E), p_cos_b, p_sin_b, q_rope_strides[1], H, E, BH, BE)


@triton.jit(do_not_specialize=["B"])
def mla_step_fwd_kernel_values(
    p_latent,
    p_w_uv,
    p_o,
    B,
    weight_strides,
    H: tl.constexpr,
    EACH: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """o = o_latent w_uv^T."""
    rows = B * EACH
    i_g, i_m, first = product_tile(rows, BM, V, BV)
    o_b, o_h, m_m = rows_of(i_m, i_g, rows, EACH, BM)
    o_v = first + tl.arange(0, BV)
    o_row = o_b * H + o_h
    b_o = tl.zeros([BM, BV], dtype=tl.float32)
    for at in tl.static_range(0, R, BR):
        o_r = at + tl.arange(0, BR)
        p_x = p_latent + (o_row * R)[:, None] + o_r[None, :]
        b_x = tl.load(p_x, mask=m_m[:, None] & (o_r < R)[None, :], other=0.0).to(DOT)
        p_w = p_w_uv + i_g.to(tl.int64) * weight_strides[0] + o_v[None, :] * weight_strides[1] + o_r[:, None]
        b_w = tl.load(p_w, mask=(o_r < R)[:, None] & (o_v < V)[None, :], other=0.0).to(DOT)
        # [BM, BR] @ [BR, BV]
        b_o = tl.dot(b_x, b_w, b_o, input_precision=PRECISION)
    tl.store(
        p_o + (o_row * V)[:, None] + o_v[None, :],
        b_o.to(p_o.dtype.element_ty),
        mask=m_m[:, None] & (o_v < V)[None, :],
    )


_LEAST_SIDE, _MOST_ROWS, _COLUMNS = 16, 64, 64  # of a product's tile
_WARPS = 4


def _side(n: int) -> int:
    return max(next_power_of_2(n), _LEAST_SIDE)


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    key_scale: int | None,
) -> Tensor:
    """The op's forward; widths are contiguous, all else may be strided."""
    (batch, _, heads, _), (weight_heads, value, rank) = q_nope.shape, w_uv.shape
    o = q_nope.new_empty(batch, 1, heads, value)
    if not batch:
        return o
    each = heads // weight_heads
    block_rows = min(_side(batch * each), _MOST_ROWS)
    tiles = weight_heads * ceil_div(batch * each, block_rows)
    dot = dot_type(q_nope.dtype)
    queries = _queries(
        *(q_nope, q_rope, kv_new, w_uk, kv_cache, cache_seqlens, position, cos, sin, block_table),
        block_rows,
        tiles,
        dot,
    )
    scales = key_scales(kv_cache, w_uk, q_rope, key_scale)
    q_latent, q_rotated, counts = queries
    latent, _ = attention.forward(
        q_latent, q_rotated, kv_cache, counts, cache_starts, block_table, scales, scale, True, False
    )
    launch(
        mla_step_fwd_kernel_values,
        (tiles * ceil_div(value, _COLUMNS), 1, 1),
        (latent, w_uv, o),
        (batch, w_uv.stride()[:2]),
        (heads, each, rank, value, block_rows, _COLUMNS, _COLUMNS, dot),
        _WARPS,
    )
    return o


def _queries(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    block_table: Tensor | None,
    block_rows: int,
    tiles: int,
    dot: tl.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """q_latent [B, 1, H, R], rotated q_rope [B, 1, H, E] and tokens that count [B]; the new rows are in the cache."""
    (batch, _, heads, nope), (weight_heads, _, rank), rope = q_nope.shape, w_uk.shape, q_rope.shape[3]
    page = 0 if block_table is None else kv_cache.shape[1]
    q_latent, q_rotated = q_nope.new_empty(batch, 1, heads, rank), q_rope.new_empty(q_rope.shape)
    counts = torch.empty(batch, dtype=torch.int32, device=q_nope.device)
    launch(
        mla_step_fwd_kernel_queries,
        (tiles * ceil_div(rank, _COLUMNS) + batch, 1, 1),
        (
            q_nope,
            q_rope if rope else None,
            kv_new,
            w_uk,
            kv_cache,
            cache_seqlens,
            position,
            cos,
            sin,
            block_table,
            q_latent,
            q_rotated if rope else None,
            counts,
        ),
        (
            batch,
            kv_cache.shape[1] if block_table is None else block_table.shape[1] * page,
            q_nope.stride()[::2],
            q_rope.stride()[::2],
            kv_new.stride(0),
            w_uk.stride()[:2],
            kv_cache.stride()[:2],
            (cos.stride(0) * (len(cos) > 1), sin.stride(0) * (len(sin) > 1)),
            0 if block_table is None else block_table.stride(0),
        ),
        (
            heads,
            heads // weight_heads,
            nope,
            rank,
            rope,
            kv_cache.shape[2],
            page,
            block_rows,
            _side(nope),
            _COLUMNS,
            _side(heads),
            _side(rope // 2),
            _side(kv_cache.shape[2]),
            dot,
        ),
        _WARPS,
    )
    return q_latent, q_rotated, counts
