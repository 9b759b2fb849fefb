"""Forward of the chunked gated delta rule in Triton: inverses of all chunks, the state from chunk to chunk, outputs.

The algebra is derived in docs/gated_delta_rule.md. Tokens count through the whole batch (`ChunkTable`); tensors that
pass from kernel to kernel are contiguous.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.chunk_table import ChunkTable, chunk_table
from hylo_ops.common.triton_math import PRECISION, chunk_at, decay, decay_between, dot_type, sequence_at

CHUNK = 64

# exp of it is 0 in float32, and unlike -inf it leaves the differences of sums defined.
_LOWEST_GATE = tl.constexpr(-1e4)


@triton.jit
def _quarters(b_x, N: tl.constexpr):
    """Upper left, lower left and lower right [N, N] of a [2 N, 2 N] tile."""
    # [row half, row, column half, column] -> [row, column, column half, row half]
    b_x = tl.permute(tl.reshape(b_x, [2, N, 2, N]), [1, 3, 2, 0])
    b_upper, b_lower = tl.split(b_x)
    b_upper_left, _ = tl.split(b_upper)
    b_lower_left, b_lower_right = tl.split(b_lower)
    return b_upper_left, b_lower_left, b_lower_right


@triton.jit
def _from_quarters(b_upper_left, b_lower_left, b_lower_right, N: tl.constexpr):
    b_upper = tl.join(b_upper_left, tl.zeros_like(b_upper_left))
    b_lower = tl.join(b_lower_left, b_lower_right)
    return tl.reshape(tl.permute(tl.join(b_upper, b_lower), [3, 0, 2, 1]), [2 * N, 2 * N])


@triton.jit
def _inverse_16(b_l):
    """(I + L)^-1 of a strictly lower [16, 16] tile.

    Once the diagonal blocks of n rows are inverted, two products join them to blocks of 2 n. All that appears is a
    part of the result: no power of L, which grows like 3^16 where keys repeat.
    """
    o_row = tl.arange(0, 16)[:, None]
    o_column = tl.arange(0, 16)[None, :]
    b_inverse = tl.where(o_row == o_column, 1.0, 0.0)
    b_inverse -= tl.where(o_row // 2 == o_column // 2, b_l, 0.0)
    for level in tl.static_range(1, 4):
        n = 2**level
        m_corner = (o_row // (2 * n) == o_column // (2 * n)) & (o_row // n != o_column // n)
        b_corner = tl.dot(tl.where(m_corner, b_l, 0.0), b_inverse, input_precision=PRECISION)
        b_inverse -= tl.dot(b_inverse, b_corner, input_precision=PRECISION)
    return b_inverse


@triton.jit
def _inverse(b_l, N: tl.constexpr):
    """(I + L)^-1 of a strictly lower [N, N] tile, by halves."""
    if N == 16:
        b_inverse = _inverse_16(b_l)
    else:
        HALF: tl.constexpr = N // 2
        b_upper, b_corner, b_lower = _quarters(b_l, HALF)
        b_upper = _inverse(b_upper, HALF)
        b_lower = _inverse(b_lower, HALF)
        b_corner = tl.dot(b_corner, b_upper, input_precision=PRECISION)
        b_corner = -tl.dot(b_lower, b_corner, input_precision=PRECISION)
        b_inverse = _from_quarters(b_upper, b_corner, b_lower, HALF)
    return b_inverse


@triton.jit
def gated_delta_rule_fwd_kernel_inverse(
    p_k,
    p_g,
    p_beta,
    p_gamma,
    p_a_inv,
    p_sequence,
    p_begin,
    p_end,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program per chunk and value head."""
    i_h = tl.program_id(1)
    i_sequence, begin, end = chunk_at(tl.program_id(0), p_sequence, p_begin, p_end, T, C)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    o_t = begin + o_c
    m_t = o_t < end
    o_th = o_t * H + i_h
    b_g = tl.load(p_g + o_th, mask=m_t, other=0.0).to(tl.float64)
    b_gamma = tl.cumsum(tl.maximum(b_g, _LOWEST_GATE), 0)
    tl.store(p_gamma + o_th, b_gamma, mask=m_t)

    b_kk = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_kt = p_k + (o_t * G + i_h // (H // G))[:, None] * K + o_k
        b_k = tl.load(p_kt, mask=m_t[:, None] & (o_k < K), other=0.0).to(DOT)
        # [C, BK] @ [BK, C] -> [C, C]
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=PRECISION)

    b_beta = tl.load(p_beta + o_th, mask=m_t, other=0.0).to(tl.float32)
    b_l = b_beta[:, None] * decay_between(b_gamma, o_c[:, None] > o_c[None, :]) * b_kk
    b_a_inv = _inverse(b_l, C)
    tl.store(p_a_inv + o_th[:, None] * C + o_c, b_a_inv.to(p_a_inv.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def gated_delta_rule_fwd_kernel_state(
    p_k,
    p_v,
    p_beta,
    p_gamma,
    p_a_inv,
    p_initial_state,
    p_h,
    p_v_new,
    p_final_state,
    p_bounds,
    p_first_chunk,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEEP: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program per sequence, value head and BV columns of the state, which it carries from chunk to chunk."""
    NK: tl.constexpr = (K + BK - 1) // BK
    i_nh = tl.program_id(0)
    i_h = i_nh % H
    begin, end, slot = sequence_at(i_nh // H, p_bounds, p_first_chunk, T, C)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_kv = o_k[:, None] * V + o_v
    o_state = i_nh.to(tl.int64) * K * V + o_kv

    # In blocks of BK rows, a tuple of them: a product with all rows at once would hold all of its operand at once.
    b_s = ()
    for i_k in tl.static_range(NK):
        b_block = tl.zeros([BK, BV], dtype=tl.float32)
        if p_initial_state is not None:
            m_kv = (i_k * BK + o_k < K)[:, None] & m_v
            b_block += tl.load(p_initial_state + i_k * BK * V + o_state, mask=m_kv, other=0.0).to(tl.float32)
        b_s = b_s + (b_block,)  # noqa: RUF005 (Triton knows no unpacking)
    for i_t in range(begin, end, C):
        o_t = i_t + o_c
        m_t = o_t < end
        o_th = o_t * H + i_h
        o_tk = (o_t * G + i_h // (H // G))[:, None] * K + o_k
        o_tv = o_th[:, None] * V + o_v
        m_tv = m_t[:, None] & m_v
        b_v = tl.load(p_v + o_tv, mask=m_tv, other=0.0).to(tl.float32)
        b_a_inv = tl.load(p_a_inv + o_th[:, None] * C + o_c, mask=m_t[:, None], other=0.0).to(DOT)
        b_beta = tl.load(p_beta + o_th, mask=m_t, other=0.0).to(tl.float32)
        b_gamma = tl.load(p_gamma + o_th, mask=m_t, other=0.0)
        gamma_end = tl.load(p_gamma + (tl.minimum(i_t + C, end) - 1) * H + i_h)

        o_h = (slot.to(tl.int64) * H + i_h) * K * V + o_kv
        b_keys = ()
        b_read = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in tl.static_range(NK):
            m_k = i_k * BK + o_k < K
            b_k = tl.load(p_k + i_k * BK + o_tk, mask=m_t[:, None] & m_k, other=0.0).to(DOT)
            tl.store(p_h + i_k * BK * V + o_h, b_s[i_k].to(p_h.dtype.element_ty), mask=m_k[:, None] & m_v)
            # [C, BK] @ [BK, BV] -> [C, BV]: what the state holds for the keys
            b_read = tl.dot(b_k, b_s[i_k].to(DOT), b_read, input_precision=PRECISION)
            if KEEP:
                b_keys = b_keys + (b_k,)  # noqa: RUF005
        b_x = b_beta[:, None] * (b_v - decay(b_gamma)[:, None] * b_read)
        # [C, C] @ [C, BV] -> [C, BV]
        b_v_new = tl.dot(b_a_inv, b_x.to(DOT), input_precision=PRECISION)
        tl.store(p_v_new + o_tv, b_v_new.to(p_v_new.dtype.element_ty), mask=m_tv)

        # Rows of what is written take the decay, so the keys go from memory to the product as they are.
        b_write = (decay(gamma_end - b_gamma)[:, None] * b_v_new).to(DOT)
        b_after = ()
        for i_k in tl.static_range(NK):
            m_tk = m_t[:, None] & (i_k * BK + o_k < K)
            b_k = b_keys[i_k] if KEEP else tl.load(p_k + i_k * BK + o_tk, mask=m_tk, other=0.0).to(DOT)
            # [BK, C] @ [C, BV] -> [BK, BV]
            b_block = tl.dot(tl.trans(b_k), b_write, decay(gamma_end) * b_s[i_k], input_precision=PRECISION)
            b_after = b_after + (b_block,)  # noqa: RUF005
        b_s = b_after
        slot += 1
    for i_k in tl.static_range(NK):
        m_kv = (i_k * BK + o_k < K)[:, None] & m_v
        tl.store(p_final_state + i_k * BK * V + o_state, b_s[i_k], mask=m_kv)


@triton.jit
def gated_delta_rule_fwd_kernel_o(
    p_q,
    p_k,
    p_gamma,
    p_h,
    p_v_new,
    p_o,
    p_sequence,
    p_begin,
    p_end,
    scale,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program per chunk, BV columns and value head."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i_slot = tl.program_id(0) // NV
    i_h = tl.program_id(1)
    i_sequence, begin, end = chunk_at(i_slot, p_sequence, p_begin, p_end, T, C)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    o_t = begin + o_c
    m_t = o_t < end
    o_v = tl.program_id(0) % NV * BV + tl.arange(0, BV)
    m_v = o_v < V
    o_tv = (o_t * H + i_h)[:, None] * V + o_v
    m_tv = m_t[:, None] & m_v

    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_p = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        o_tk = (o_t * G + i_h // (H // G))[:, None] * K + o_k
        b_q = tl.load(p_q + o_tk, mask=m_t[:, None] & m_k, other=0.0).to(DOT)
        b_k = tl.load(p_k + o_tk, mask=m_t[:, None] & m_k, other=0.0).to(DOT)
        p_hk = p_h + ((i_slot.to(tl.int64) * H + i_h) * K + o_k)[:, None] * V + o_v
        b_h = tl.load(p_hk, mask=m_k[:, None] & m_v, other=0.0).to(DOT)
        # [C, BK] @ [BK, BV] -> [C, BV]
        b_o = tl.dot(b_q, b_h, b_o, input_precision=PRECISION)
        # [C, BK] @ [BK, C] -> [C, C]
        b_p = tl.dot(b_q, tl.trans(b_k), b_p, input_precision=PRECISION)

    b_gamma = tl.load(p_gamma + o_t * H + i_h, mask=m_t, other=0.0)
    b_v_new = tl.load(p_v_new + o_tv, mask=m_tv, other=0.0).to(DOT)
    b_p *= decay_between(b_gamma, (o_c[:, None] >= o_c[None, :]) & m_t[:, None])
    # [C, C] @ [C, BV] -> [C, BV]
    b_o = tl.dot(b_p.to(DOT), b_v_new, decay(b_gamma)[:, None] * b_o, input_precision=PRECISION)
    tl.store(p_o + o_tv, (scale * b_o).to(p_o.dtype.element_ty), mask=m_tv)


class Config(NamedTuple):
    """The widest tiles of keys and of values (0: it takes none) of a program, and how Triton compiles it."""

    BK: int
    BV: int
    num_warps: int
    num_stages: int

    def fitted(self, K: int, V: int) -> "Config":
        BK, BV = (min(most, triton.next_power_of_2(size)) for most, size in ((self.BK, K), (self.BV, V)))
        return self._replace(BK=BK, BV=BV)


# Chosen on 2026-11-24 by registers, spills and shared memory of what Triton 3.6 compiles for sm_90, not yet by time.
# float32 loads without buffers ahead: operands that tf32x3 splits live in registers, and products of four warps on
# them must not be under way over the edge of a loop.
_INVERSE = Config(64, 0, 1, 2)
_INVERSE_FP32 = Config(16, 0, 2, 2)
_OUTPUT = Config(64, 128, 4, 2)
_OUTPUT_FP32 = Config(32, 64, 4, 1)
_STATE = Config(64, 32, 4, 2)  # the state is not split along K, only held in blocks of BK rows
_STATE_FP32 = Config(64, 32, 4, 1)


def _configs(K: int, V: int, dtype: torch.dtype) -> tuple[Config, Config, Config]:
    """Of the kernels inverse, state and o."""
    wide = dtype == torch.float32
    chosen = (_INVERSE_FP32, _STATE_FP32, _OUTPUT_FP32) if wide else (_INVERSE, _STATE, _OUTPUT)
    inverse, state, output = (config.fitted(K, V) for config in chosen)
    return inverse, state, output


def intermediates(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, table: ChunkTable
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the outputs and the backward are made of. Inputs as the op has them, contiguous.

    Returns:
        gamma: [B * T, H] fp64. Sums of the gates from the chunk's start, the token's own included.
        a_inv: [B * T, H, 64], dtype of q. Row of (I + L)^-1 at each token; columns are the tokens of its chunk.
        h: [slots, H, K, V], dtype of q. State before each chunk; undefined in unused slots.
        v_new: [B * T, H, V], dtype of q. What each token writes.
        final_state: [N, H, K, V] fp32.
    """
    (B, T, G, K), (_, _, H, V) = q.shape, v.shape
    gamma = q.new_empty(B * T, H, dtype=torch.float64)
    a_inv = q.new_empty(B * T, H, CHUNK)
    h = q.new_empty(table.slots, H, K, V)
    v_new = q.new_empty(B * T, H, V)
    final_state = q.new_empty(table.sequences, H, K, V, dtype=torch.float32)

    inverse, state, _ = _configs(K, V, q.dtype)
    gated_delta_rule_fwd_kernel_inverse[(table.slots, H)](
        k,
        g,
        beta,
        gamma,
        a_inv,
        table.sequence,
        table.begin,
        table.end,
        T,
        G,
        H,
        K,
        CHUNK,
        inverse.BK,
        dot_type(q.dtype),
        num_warps=inverse.num_warps,
        num_stages=inverse.num_stages,
    )
    gated_delta_rule_fwd_kernel_state[(table.sequences * H, triton.cdiv(V, state.BV))](
        k,
        v,
        beta,
        gamma,
        a_inv,
        initial_state,
        h,
        v_new,
        final_state,
        table.bounds,
        table.first_chunk,
        T,
        G,
        H,
        K,
        V,
        CHUNK,
        state.BK,
        state.BV,
        q.dtype != torch.float32,
        dot_type(q.dtype),
        num_warps=state.num_warps,
        num_stages=state.num_stages,
    )
    return gamma, a_inv, h, v_new, final_state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    fixed_split: bool,
) -> tuple[Tensor, Tensor]:
    """The op's forward. No sum is split by what else is in the batch, so `fixed_split` changes nothing."""
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    initial_state = None if initial_state is None else initial_state.contiguous()
    (B, T, G, K), (_, _, H, V) = q.shape, v.shape
    table = chunk_table(B, T, cu_seqlens, CHUNK)
    gamma, _, h, v_new, final_state = intermediates(q, k, v, g, beta, initial_state, table)
    o = torch.empty_like(v)
    _, _, output = _configs(K, V, q.dtype)
    gated_delta_rule_fwd_kernel_o[(table.slots * triton.cdiv(V, output.BV), H)](
        q,
        k,
        gamma,
        h,
        v_new,
        o,
        table.sequence,
        table.begin,
        table.end,
        scale,
        T,
        G,
        H,
        K,
        V,
        CHUNK,
        output.BK,
        output.BV,
        dot_type(q.dtype),
        num_warps=output.num_warps,
        num_stages=output.num_stages,
    )
    return o, final_state
