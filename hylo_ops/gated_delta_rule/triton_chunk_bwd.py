"""Triton backward of the chunked gated delta rule, and its launcher. The algebra is in docs/gated_delta_rule.md.

Only `..._state` walks from chunk to chunk, last one first; all other kernels take one chunk a program. No atomics: the
order of every sum is fixed.

The gradient of a gate is the sum over all pairs of a token before it and a token at or after it. It is summed in this
form: the shorter one, a difference of row and column sums followed by a sum over the chunk, cancels.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.chunk_table import ChunkTable, chunk_table
from hylo_ops.common.triton_math import chunk_at, decay, decay_between, dot_type, sequence_at
from hylo_ops.gated_delta_rule.triton_chunk_fwd import CHUNK, Config, intermediates

# Of float32 operands only: three products of tensor cores instead of one without them. With "ieee" every kernel that
# sums over 64 tokens holds its operands in registers as a whole, and spills kilobytes.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
def _load_gamma(p_gamma, i_t, end, i_h, H: tl.constexpr, C: tl.constexpr):
    """Sums of the gates of a chunk, and the last of them, which rows past the sequence's end repeat."""
    o_t = i_t + tl.arange(0, C)
    gamma_end = tl.load(p_gamma + (tl.minimum(i_t + C, end) - 1) * H + i_h)
    b_gamma = tl.load(p_gamma + o_t * H + i_h, mask=o_t < end, other=0.0)
    return tl.where(o_t < end, b_gamma, gamma_end), gamma_end


@triton.jit
def gated_delta_rule_bwd_kernel_reads(
    p_q,
    p_k,
    p_gamma,
    p_reads,
    p_sequence,
    p_begin,
    p_end,
    scale,
    T,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Scaled P^T: row j holds how strongly the queries of its chunk read what token j wrote.

    One program per chunk and query-key head.
    """
    R: tl.constexpr = H // G
    i_g = tl.program_id(1)
    i_sequence, begin, end = chunk_at(tl.program_id(0), p_sequence, p_begin, p_end, T, C)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    o_t = begin + o_c
    m_t = o_t < end

    b_kq = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        o_tk = (o_t * G + i_g)[:, None] * K + o_k
        m_tk = m_t[:, None] & (o_k < K)
        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)
        # [C, BK] @ [BK, C] -> [C, C]: the transpose comes from swapped operands, not from a transposed result
        b_kq = tl.dot(b_k, tl.trans(b_q), b_kq, input_precision=_PRECISION)

    for r in range(R):
        i_h = i_g * R + r
        b_gamma, _ = _load_gamma(p_gamma, begin, end, i_h, H, C)
        # The mask and the signs are those of the transpose: row j, column i.
        b_reads = scale * b_kq * decay_between(-b_gamma, o_c[:, None] <= o_c[None, :])
        p_row = p_reads + (o_t * H + i_h)[:, None] * C + o_c
        tl.store(p_row, b_reads.to(p_reads.dtype.element_ty), mask=m_t[:, None])


@triton.jit
def gated_delta_rule_bwd_kernel_state(
    p_q,
    p_k,
    p_beta,
    p_gamma,
    p_a_inv,
    p_reads,
    p_do,
    p_d_final_state,
    p_dh,
    p_dx,
    p_d_initial_state,
    p_bounds,
    p_first_chunk,
    scale,
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
    """One program per sequence, value head and BV columns of the state's gradient, carried from the last chunk back."""
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
    b_ds = ()
    for i_k in tl.static_range(NK):
        m_kv = (i_k * BK + o_k < K)[:, None] & m_v
        b_block = tl.load(p_d_final_state + i_k * BK * V + o_state, mask=m_kv, other=0.0)
        b_ds = b_ds + (b_block.to(tl.float32),)  # noqa: RUF005 (Triton knows no unpacking)
    chunks = tl.cdiv(end - begin, C)
    for i in range(chunks):
        i_chunk = chunks - 1 - i
        i_t = begin + i_chunk * C
        o_t = i_t + o_c
        m_t = o_t < end
        o_th = o_t * H + i_h
        o_tk = (o_t * G + i_h // (H // G))[:, None] * K + o_k
        o_tv = o_th[:, None] * V + o_v
        m_tv = m_t[:, None] & m_v
        b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT)
        b_reads = tl.load(p_reads + o_th[:, None] * C + o_c, mask=m_t[:, None], other=0.0).to(DOT)
        b_a_inv = tl.load(p_a_inv + o_th[:, None] * C + o_c, mask=m_t[:, None], other=0.0).to(DOT)
        b_beta = tl.load(p_beta + o_th, mask=m_t, other=0.0).to(tl.float32)
        b_gamma, gamma_end = _load_gamma(p_gamma, i_t, end, i_h, H, C)

        o_dh = ((slot + i_chunk).to(tl.int64) * H + i_h) * K * V + o_kv
        b_keys = ()
        b_dv_new = tl.zeros([C, BV], dtype=tl.float32)
        for i_k in tl.static_range(NK):
            m_k = i_k * BK + o_k < K
            b_k = tl.load(p_k + i_k * BK + o_tk, mask=m_t[:, None] & m_k, other=0.0).to(DOT)
            b_block = b_ds[i_k]
            tl.store(p_dh + i_k * BK * V + o_dh, b_block.to(p_dh.dtype.element_ty), mask=m_k[:, None] & m_v)
            # [C, BK] @ [BK, BV] -> [C, BV]: what later chunks want of this one's writes
            b_dv_new = tl.dot(b_k, b_block.to(DOT), b_dv_new, input_precision=_PRECISION)
            if KEEP:
                b_keys = b_keys + (b_k,)  # noqa: RUF005
        b_dv_new *= decay(gamma_end - b_gamma)[:, None]
        # [C, C] @ [C, BV] -> [C, BV]: and what its own queries want
        b_dv_new = tl.dot(b_reads, b_do, b_dv_new, input_precision=_PRECISION)
        b_dx = tl.dot(tl.trans(b_a_inv), b_dv_new.to(DOT), input_precision=_PRECISION)
        tl.store(p_dx + o_tv, b_dx.to(p_dx.dtype.element_ty), mask=m_tv)

        # Rows of the narrow operands take the decays, so the wide ones go from memory to the products as they are.
        b_from_start = decay(b_gamma)
        b_wanted = ((scale * b_from_start)[:, None] * b_do.to(tl.float32)).to(DOT)
        b_removed = ((-b_beta * b_from_start)[:, None] * b_dx).to(DOT)
        b_before = ()
        for i_k in tl.static_range(NK):
            m_tk = m_t[:, None] & (i_k * BK + o_k < K)
            b_q = tl.load(p_q + i_k * BK + o_tk, mask=m_tk, other=0.0).to(DOT)
            b_k = b_keys[i_k] if KEEP else tl.load(p_k + i_k * BK + o_tk, mask=m_tk, other=0.0).to(DOT)
            b_block = decay(gamma_end) * b_ds[i_k]
            # [BK, C] @ [C, BV] -> [BK, BV]
            b_block = tl.dot(tl.trans(b_q), b_wanted, b_block, input_precision=_PRECISION)
            b_block = tl.dot(tl.trans(b_k), b_removed, b_block, input_precision=_PRECISION)
            b_before = b_before + (b_block,)  # noqa: RUF005
        b_ds = b_before
    if p_d_initial_state is not None:
        for i_k in tl.static_range(NK):
            m_kv = (i_k * BK + o_k < K)[:, None] & m_v
            tl.store(p_d_initial_state + i_k * BK * V + o_state, b_ds[i_k], mask=m_kv)


@triton.jit
def gated_delta_rule_bwd_kernel_scores(
    p_q,
    p_k,
    p_v,
    p_beta,
    p_gamma,
    p_v_new,
    p_do,
    p_dx,
    p_d_scores,
    p_d_solve,
    p_dv,
    p_dg,
    p_dbeta,
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
    """Gradients of the [C, C] products Q K^T and K K^T, dv, and the part of dg and dbeta that goes through them.

    One program per chunk and value head.
    """
    i_h = tl.program_id(1)
    i_sequence, begin, end = chunk_at(tl.program_id(0), p_sequence, p_begin, p_end, T, C)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    o_t = begin + o_c
    m_t = o_t < end
    o_th = o_t * H + i_h
    b_beta = tl.load(p_beta + o_th, mask=m_t, other=0.0).to(tl.float32)

    b_dp = tl.zeros([C, C], dtype=tl.float32)
    b_dl = tl.zeros([C, C], dtype=tl.float32)
    b_dbeta = tl.zeros([C], dtype=tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        o_tv = o_th[:, None] * V + o_v
        m_tv = m_t[:, None] & (o_v < V)
        b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT)
        b_dx = tl.load(p_dx + o_tv, mask=m_tv, other=0.0).to(DOT)
        b_v_new = tl.load(p_v_new + o_tv, mask=m_tv, other=0.0).to(DOT)
        b_v = tl.load(p_v + o_tv, mask=m_tv, other=0.0).to(tl.float32)
        # [C, BV] @ [BV, C] -> [C, C]
        b_dp = tl.dot(b_do, tl.trans(b_v_new), b_dp, input_precision=_PRECISION)
        b_dl = tl.dot(b_dx, tl.trans(b_v_new), b_dl, input_precision=_PRECISION)
        b_dx_wide = b_dx.to(tl.float32)
        b_dbeta += tl.sum(b_dx_wide * b_v, 1)
        tl.store(p_dv + o_tv, (b_beta[:, None] * b_dx_wide).to(p_dv.dtype.element_ty), mask=m_tv)

    b_gamma, _ = _load_gamma(p_gamma, begin, end, i_h, H, C)
    b_decay = decay_between(b_gamma, o_c[:, None] >= o_c[None, :])
    m_below = o_c[:, None] > o_c[None, :]
    b_dp *= scale * b_decay
    b_dl = tl.where(m_below, -b_dl * b_decay, 0.0)
    p_row = p_d_scores + o_th[:, None] * C + o_c
    tl.store(p_row, b_dp.to(p_d_scores.dtype.element_ty), mask=m_t[:, None])
    # K K^T is symmetric: both of its halves go to dk, so they are stored as one product's operand.
    b_dkk = b_beta[:, None] * b_dl
    b_symmetric = b_dkk + tl.trans(b_dkk)
    p_row = p_d_solve + o_th[:, None] * C + o_c
    tl.store(p_row, b_symmetric.to(p_d_solve.dtype.element_ty), mask=m_t[:, None])

    b_qk = tl.zeros([C, C], dtype=tl.float32)
    b_kk = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        o_tk = (o_t * G + i_h // (H // G))[:, None] * K + o_k
        m_tk = m_t[:, None] & (o_k < K)
        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)
        # [C, BK] @ [BK, C] -> [C, C]
        b_qk = tl.dot(b_q, tl.trans(b_k), b_qk, input_precision=_PRECISION)
        b_kk = tl.dot(b_k, tl.trans(b_k), b_kk, input_precision=_PRECISION)
    b_dl *= b_kk
    b_pairs = tl.where(m_below, b_dp * b_qk, 0.0) + b_beta[:, None] * b_dl
    b_dg = tl.sum(tl.where(m_below, tl.cumsum(b_pairs, 0, reverse=True), 0.0), 1)
    tl.store(p_dg + o_th, b_dg, mask=m_t)
    tl.store(p_dbeta + o_th, b_dbeta + tl.sum(b_dl, 1), mask=m_t)


@triton.jit
def gated_delta_rule_bwd_kernel_qk(
    p_q,
    p_k,
    p_beta,
    p_gamma,
    p_h,
    p_v_new,
    p_do,
    p_dh,
    p_dx,
    p_d_scores,
    p_d_solve,
    p_dq,
    p_dk,
    p_dg,
    p_dbeta,
    p_sequence,
    p_begin,
    p_end,
    scale,
    tokens,
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
    """dq and dk, summed over the value heads that share them, and these BK rows' part of dg and dbeta.

    One program per chunk, BK rows of the state and query-key head.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    R: tl.constexpr = H // G
    i_slot = tl.program_id(0) // NK
    i_k = tl.program_id(0) % NK
    i_g = tl.program_id(1)
    i_sequence, begin, end = chunk_at(i_slot, p_sequence, p_begin, p_end, T, C)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_t = begin + o_c
    m_t = o_t < end
    m_k = o_k < K
    o_tk = (o_t * G + i_g)[:, None] * K + o_k
    m_tk = m_t[:, None] & m_k

    b_dq = tl.zeros([C, BK], dtype=tl.float32)
    b_dk = tl.zeros([C, BK], dtype=tl.float32)
    for r in range(R):
        i_h = i_g * R + r
        o_th = o_t * H + i_h
        o_hk = ((i_slot.to(tl.int64) * H + i_h) * K + o_k)[:, None] * V
        b_read = tl.zeros([C, BK], dtype=tl.float32)
        b_removed = tl.zeros([C, BK], dtype=tl.float32)
        b_written = tl.zeros([C, BK], dtype=tl.float32)
        b_kept = tl.zeros([BK], dtype=tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            m_v = o_v < V
            o_tv = o_th[:, None] * V + o_v
            m_tv = m_t[:, None] & m_v
            m_kv = m_k[:, None] & m_v
            b_h = tl.load(p_h + o_hk + o_v, mask=m_kv, other=0.0).to(DOT)
            b_dh = tl.load(p_dh + o_hk + o_v, mask=m_kv, other=0.0).to(DOT)
            b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(DOT)
            b_dx = tl.load(p_dx + o_tv, mask=m_tv, other=0.0).to(DOT)
            b_v_new = tl.load(p_v_new + o_tv, mask=m_tv, other=0.0).to(DOT)
            # [C, BV] @ [BV, BK] -> [C, BK]
            b_read = tl.dot(b_do, tl.trans(b_h), b_read, input_precision=_PRECISION)
            b_removed = tl.dot(b_dx, tl.trans(b_h), b_removed, input_precision=_PRECISION)
            b_written = tl.dot(b_v_new, tl.trans(b_dh), b_written, input_precision=_PRECISION)
            b_kept += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)

        b_beta = tl.load(p_beta + o_th, mask=m_t, other=0.0).to(tl.float32)
        b_gamma, gamma_end = _load_gamma(p_gamma, begin, end, i_h, H, C)
        b_from_start = decay(b_gamma)
        b_read *= (scale * b_from_start)[:, None]
        b_removed *= b_from_start[:, None]
        b_written *= decay(gamma_end - b_gamma)[:, None]
        b_q = tl.load(p_q + o_tk, mask=m_tk, other=0.0).to(DOT)
        b_k = tl.load(p_k + o_tk, mask=m_tk, other=0.0).to(DOT)
        b_k_wide = b_k.to(tl.float32)
        b_dbeta = -tl.sum(b_k_wide * b_removed, 1)
        # A gate stands between the old state and tokens at or after it, between tokens before it and the new state,
        # and between the two states.
        b_reads = tl.sum(b_q.to(tl.float32) * b_read, 1) + b_beta * b_dbeta
        b_writes = tl.sum(b_k_wide * b_written, 1)
        b_dg = tl.cumsum(b_reads, 0, reverse=True) + tl.cumsum(b_writes, 0) - b_writes
        b_dg += decay(gamma_end) * tl.sum(b_kept, 0)
        o_part = i_k.to(tl.int64) * tokens * H + o_th
        tl.store(p_dg + o_part, b_dg, mask=m_t)
        tl.store(p_dbeta + o_part, b_dbeta, mask=m_t)

        b_dq += b_read
        b_dk += b_written - b_beta[:, None] * b_removed
        o_cc = o_th[:, None] * C + o_c
        b_d_scores = tl.load(p_d_scores + o_cc, mask=m_t[:, None], other=0.0).to(DOT)
        b_d_solve = tl.load(p_d_solve + o_cc, mask=m_t[:, None], other=0.0).to(DOT)
        # [C, C] @ [C, BK] -> [C, BK]
        b_dq = tl.dot(b_d_scores, b_k, b_dq, input_precision=_PRECISION)
        b_dk = tl.dot(tl.trans(b_d_scores), b_q, b_dk, input_precision=_PRECISION)
        b_dk = tl.dot(b_d_solve, b_k, b_dk, input_precision=_PRECISION)
    tl.store(p_dq + o_tk, b_dq.to(p_dq.dtype.element_ty), mask=m_tk)
    tl.store(p_dk + o_tk, b_dk.to(p_dk.dtype.element_ty), mask=m_tk)


@triton.jit
def gated_delta_rule_bwd_kernel_gates(
    p_g, p_dg_parts, p_dbeta_parts, p_dg, p_dbeta, size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """dg and dbeta out of their parts [PARTS, B * T * H]. One program per BLOCK elements."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32)
    b_dg = tl.zeros([BLOCK], dtype=tl.float32)
    b_dbeta = tl.zeros([BLOCK], dtype=tl.float32)
    o_part = o
    for _ in range(PARTS):
        b_dg += tl.load(p_dg_parts + o_part, mask=m, other=0.0)
        b_dbeta += tl.load(p_dbeta_parts + o_part, mask=m, other=0.0)
        o_part += size
    b_dg = tl.where(b_g == float("-inf"), 0.0, b_dg)
    tl.store(p_dg + o, b_dg.to(p_dg.dtype.element_ty), mask=m)
    tl.store(p_dbeta + o, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m)


# Chosen on 2026-11-24 by registers, spills and shared memory of what Triton 3.6 compiles for sm_90, not yet by time.
# float32 loads without buffers ahead: operands that tf32x3 splits live in registers, and such products must not be
# under way over the edge of a loop.
_READS = Config(64, 0, 4, 2)
_READS_FP32 = Config(64, 0, 4, 1)
# By the power of two that holds K: the state is not split along it, only held in blocks.
_STATE = {rows: Config(64, 64, 4, 2) for rows in (16, 32, 64, 128)} | {256: Config(64, 32, 4, 2)}
_STATE_FP32 = {rows: Config(64, 32, 4, 1) for rows in (16, 32, 64)} | {
    rows: Config(64, 16, 4, 1) for rows in (128, 256)
}
_SCORES = Config(64, 64, 4, 2)
_SCORES_FP32 = Config(32, 32, 4, 1)
# A query-key head that several value heads share holds two more sums.
_QK = {False: Config(64, 64, 4, 2), True: Config(64, 64, 8, 2)}
_QK_FP32 = {False: Config(32, 32, 4, 1), True: Config(16, 32, 4, 1)}


class _Configs(NamedTuple):
    reads: Config
    state: Config
    scores: Config
    qk: Config


def _configs(q: Tensor, v: Tensor) -> _Configs:
    (G, K), (H, V) = q.shape[2:], v.shape[2:]
    rows, shared = triton.next_power_of_2(K), H > G
    if q.dtype == torch.float32:
        chosen = _READS_FP32, _STATE_FP32[rows], _SCORES_FP32, _QK_FP32[shared]
    else:
        chosen = _READS, _STATE[rows], _SCORES, _QK[shared]
    return _Configs(*(config.fitted(K, V) for config in chosen))


class _Call(NamedTuple):
    """What several kernels of one backward take: the op's inputs, contiguous, and what the forward made of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    do: Tensor
    scale: float
    table: ChunkTable
    gamma: Tensor
    a_inv: Tensor
    h: Tensor
    v_new: Tensor
    configs: _Configs

    @property
    def chunks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.table.sequence, self.table.begin, self.table.end

    def options(self, config: Config) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        dims = {"G": self.q.shape[2], "H": self.v.shape[2], "K": self.q.shape[3], "C": CHUNK, "BK": config.BK}
        if config.BV:
            dims |= {"V": self.v.shape[3], "BV": config.BV}
        compiled = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return dims | {"DOT": dot_type(self.q.dtype)} | compiled


def backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    fixed_split: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, g, beta and, where given, initial_state, in their dtypes.

    Recomputes what the forward made. No sum is split by what else is in the batch, so `fixed_split` changes nothing.

    Args:
        grads: gradients of o and of final_state.
    """
    q, k, v, g, beta, do, d_final_state = (x.contiguous() for x in (q, k, v, g, beta, *grads))
    initial_state = None if initial_state is None else initial_state.contiguous()
    table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, CHUNK)
    gamma, a_inv, h, v_new, _ = intermediates(q, k, v, g, beta, initial_state, table)
    call = _Call(q, k, v, g, beta, do, scale, table, gamma, a_inv, h, v_new, _configs(q, v))
    d_initial_state = None if initial_state is None else torch.empty_like(initial_state)

    dh, dx = _state_gradients(call, d_final_state, d_initial_state)
    NK = triton.cdiv(q.shape[3], call.configs.qk.BK)
    # [1 + NK, tokens, H]: through the scores, then through each block of the state's rows
    dg_parts = gamma.new_empty(1 + NK, *gamma.shape, dtype=torch.float32)
    dbeta_parts = torch.empty_like(dg_parts)
    d_scores, d_solve, dv = _score_gradients(call, dx, dg_parts, dbeta_parts)
    dq, dk = _query_key_gradients(call, dh, dx, d_scores, d_solve, dg_parts, dbeta_parts)
    dg, dbeta = _gate_gradients(call, dg_parts, dbeta_parts)
    found = [dq, dk, dv, dg, dbeta]
    return found if d_initial_state is None else [*found, d_initial_state]


def _state_gradients(call: _Call, d_final_state: Tensor, d_initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """dh [slots, H, K, V], gradient of the state after each chunk, and dx [tokens, H, V]; fills d_initial_state."""
    q, k, table = call.q, call.k, call.table
    (T, G), (H, V) = q.shape[1:3], call.v.shape[2:]
    reads = torch.empty_like(call.a_inv)
    gated_delta_rule_bwd_kernel_reads[(table.slots, G)](
        q, k, call.gamma, reads, *call.chunks, call.scale, T, **call.options(call.configs.reads)
    )
    dh, dx = torch.empty_like(call.h), torch.empty_like(call.v_new)
    config = call.configs.state
    gated_delta_rule_bwd_kernel_state[(table.sequences * H, triton.cdiv(V, config.BV))](
        q,
        k,
        call.beta,
        call.gamma,
        call.a_inv,
        reads,
        call.do,
        d_final_state,
        dh,
        dx,
        d_initial_state,
        table.bounds,
        table.first_chunk,
        call.scale,
        T,
        KEEP=q.dtype != torch.float32,
        **call.options(config),
    )
    return dh, dx


def _score_gradients(call: _Call, dx: Tensor, dg_parts: Tensor, dbeta_parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scores and of K K^T, [tokens, H, 64] each, and dv; fills the first part of dg and dbeta."""
    q, k, v = call.q, call.k, call.v
    d_scores, d_solve, dv = torch.empty_like(call.a_inv), torch.empty_like(call.a_inv), torch.empty_like(v)
    gated_delta_rule_bwd_kernel_scores[(call.table.slots, v.shape[2])](
        q,
        k,
        v,
        call.beta,
        call.gamma,
        call.v_new,
        call.do,
        dx,
        d_scores,
        d_solve,
        dv,
        dg_parts,
        dbeta_parts,
        *call.chunks,
        call.scale,
        q.shape[1],
        **call.options(call.configs.scores),
    )
    return d_scores, d_solve, dv


def _query_key_gradients(
    call: _Call, dh: Tensor, dx: Tensor, d_scores: Tensor, d_solve: Tensor, dg_parts: Tensor, dbeta_parts: Tensor
) -> tuple[Tensor, Tensor]:
    """dq and dk; fills all but the first part of dg and dbeta."""
    q, k = call.q, call.k
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    NK = dg_parts.shape[0] - 1
    gated_delta_rule_bwd_kernel_qk[(call.table.slots * NK, q.shape[2])](
        q,
        k,
        call.beta,
        call.gamma,
        call.h,
        call.v_new,
        call.do,
        dh,
        dx,
        d_scores,
        d_solve,
        dq,
        dk,
        dg_parts[1:],
        dbeta_parts[1:],
        *call.chunks,
        call.scale,
        call.gamma.shape[0],
        q.shape[1],
        **call.options(call.configs.qk),
    )
    return dq, dk


def _gate_gradients(call: _Call, dg_parts: Tensor, dbeta_parts: Tensor) -> tuple[Tensor, Tensor]:
    dg, dbeta = torch.empty_like(call.g), torch.empty_like(call.beta)
    size, BLOCK = dg.numel(), 1024
    gated_delta_rule_bwd_kernel_gates[(triton.cdiv(size, BLOCK),)](
        call.g, dg_parts, dbeta_parts, dg, dbeta, size, dg_parts.shape[0], BLOCK, num_warps=4
    )
    return dg, dbeta
