"""Forward of the chunked SSD scan in Triton, and the kernels that it shares with the backward.

A chunk of Q tokens is the unit of the states in memory; within it all goes in blocks of C tokens. Tokens count through
the whole batch (`ChunkTable`). The algebra, and why three kernels are enough for outputs and gradients, is in
docs/ssd.md. Decays are kept as base-2 logarithms.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.chunk_table import ChunkTable, chunk_table
from hylo_ops.common.triton_math import PRECISION, chunk_at, dot_type, sequence_at, softplus

_LOG2_E = tl.constexpr(1.4426950408889634)
# exp of it is 0 in float32. Unlike -inf it leaves differences of sums defined, and unlike -1e6 it leaves them exact.
_LOWEST_GATE = tl.constexpr(-128.0)


@triton.jit
def step_size(x, least, most, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """The step of a token from dt with its bias."""
    if SOFTPLUS:
        x = softplus(x)
    if LIMITED:
        x = tl.clamp(x, least, most, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def load_with_bias(p_dt, o_dt, m_dt, p_dt_bias, i_h):
    """dt plus the head's bias."""
    b_dt = tl.load(p_dt + o_dt, mask=m_dt, other=0.0).to(tl.float32)
    if p_dt_bias is not None:
        b_dt += tl.load(p_dt_bias + i_h).to(tl.float32)
    return b_dt


@triton.jit
def _steps_and_gates(
    p_dt,
    dt_stride,
    p_dt_bias,
    p_a,
    i_h,
    rows,
    least,
    most,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Steps and log decays (float64) of N tokens; 0 from token `rows` on."""
    o_n = tl.arange(0, N)
    b_dt = load_with_bias(p_dt, o_n * dt_stride, o_n < rows, p_dt_bias, i_h)
    b_step = step_size(b_dt, least, most, SOFTPLUS, LIMITED)
    b_g = tl.maximum(b_step.to(tl.float64) * tl.load(p_a + i_h).to(tl.float64), _LOWEST_GATE)
    return tl.where(o_n < rows, b_step, 0.0), tl.where(o_n < rows, b_g, 0.0)


@triton.jit
def _load_tile(p_x, stride, rows, first, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr):
    """[N, BE] out of rows `stride` apart; zeros from row `rows` and from column E on."""
    o_n = tl.arange(0, N)
    o_e = first + tl.arange(0, BE)
    m_tile = (o_n < rows)[:, None] & (o_e < E)[None, :]
    return tl.load(p_x + o_n[:, None] * stride + o_e[None, :], mask=m_tile, other=0.0)


@triton.jit
def _load_gamma(p_gamma, o_t, m_t, size, EXACT: tl.constexpr):
    """Sums of log decays as two floats, whose differences are as good as those of float64; else the first, twice."""
    b_high = tl.load(p_gamma + o_t, mask=m_t, other=0.0)
    b_low = tl.load(p_gamma + size + o_t, mask=m_t, other=0.0) if EXACT else b_high
    return b_high, b_low


@triton.jit
def _log_ratio(b_high, b_low, b_high_o, b_low_o, EXACT: tl.constexpr):
    """Log decay between the second tokens and the first."""
    return (b_high - b_high_o) + (b_low - b_low_o) if EXACT else b_high - b_high_o


@triton.jit
def _row_products(p_x, stride, rows, first, E: tl.constexpr, b_y, N: tl.constexpr, BE: tl.constexpr):
    """Of each row of x and its row of y. Loads x anew: kept beside y it would cost registers, and it is in the L1."""
    return tl.sum(_load_tile(p_x, stride, rows, first, E, N, BE).to(tl.float32) * b_y, 1)


@triton.jit
def ssd_kernel_states(
    p_left,
    p_right,
    p_dt,
    p_dt_bias,
    p_a,
    p_step,
    p_gamma,
    p_states,
    p_sequence,
    p_begin,
    p_end,
    least,
    most,
    left_stride_t,
    left_stride_h,
    right_stride_t,
    right_stride_h,
    dt_stride_t,
    dt_stride_h,
    tokens,
    T,
    H: tl.constexpr,
    H_LEFT: tl.constexpr,
    H_RIGHT: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    DOT: tl.constexpr,
):
    """Sum over a chunk's tokens of left (weight right)^T.

    With p_dt left is x, right b and the weight what is left of a write at the chunk's end: what the chunk adds to the
    state. p_step and p_gamma are written. Without it left is do, right c and the weight what is left of the state:
    what the chunk's outputs want of the state before it. One program per chunk, head and [BV, BK] of the state.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_h = pid % H
    i_k = pid // H % NK
    i_v = pid // (H * NK) % NV
    i_slot = pid // (H * NK * NV)
    i_sequence, begin, end = chunk_at(i_slot, p_sequence, p_begin, p_end, T, Q)
    if i_sequence < 0:
        return
    o_c = tl.arange(0, C)
    size = tl.minimum(end - begin, Q).to(tl.int32)
    p_gamma += i_h.to(tl.int64) * tokens + begin
    p_left += begin * left_stride_t + i_h // (H // H_LEFT) * left_stride_h
    p_right += begin * right_stride_t + i_h // (H // H_RIGHT) * right_stride_h
    if p_dt is not None:
        p_step += i_h.to(tl.int64) * tokens + begin
        p_dt += begin * dt_stride_t + i_h * dt_stride_h
        _, b_gates = _steps_and_gates(p_dt, dt_stride_t, p_dt_bias, p_a, i_h, size, least, most, Q, SOFTPLUS, LIMITED)
        whole = tl.sum(b_gates, 0)
        before = whole * 0.0

    b_state = tl.zeros([BV, BK], dtype=tl.float32)
    for i_c in range(0, size, C):
        m_c = i_c + o_c < size
        if p_dt is not None:
            p_dt_c = p_dt + i_c * dt_stride_t
            b_step, b_g = _steps_and_gates(
                p_dt_c, dt_stride_t, p_dt_bias, p_a, i_h, size - i_c, least, most, C, SOFTPLUS, LIMITED
            )
            b_gamma = before + tl.cumsum(b_g, 0)
            before += tl.sum(b_g, 0)
            if (i_k == 0) & (i_v == 0):
                b_log2 = b_gamma * _LOG2_E
                b_high = b_log2.to(tl.float32)
                tl.store(p_step + i_c + o_c, b_step, mask=m_c)
                tl.store(p_gamma + i_c + o_c, b_high, mask=m_c)
                tl.store(p_gamma + tokens * H + i_c + o_c, (b_log2 - b_high.to(tl.float64)).to(tl.float32), mask=m_c)
            b_weight = b_step * tl.exp2(((whole - b_gamma) * _LOG2_E).to(tl.float32))
        else:
            b_weight = tl.exp2(tl.load(p_gamma + i_c + o_c, mask=m_c, other=0.0))
        b_left = _load_tile(p_left + i_c * left_stride_t, left_stride_t, size - i_c, i_v * BV, V, C, BV).to(DOT)
        b_right = _load_tile(p_right + i_c * right_stride_t, right_stride_t, size - i_c, i_k * BK, K, C, BK)
        b_right = (b_weight[:, None] * b_right.to(tl.float32)).to(DOT)
        # [BV, C] @ [C, BK] -> [BV, BK]
        b_state = tl.dot(tl.trans(b_left), b_right, b_state, input_precision=PRECISION)
    o_v = i_v * BV + tl.arange(0, BV)
    o_k = i_k * BK + tl.arange(0, BK)
    p_states += (i_slot.to(tl.int64) * H + i_h) * V * K
    tl.store(p_states + o_v[:, None] * K + o_k, b_state, mask=(o_v < V)[:, None] & (o_k < K))


@triton.jit
def ssd_kernel_pass(
    p_states,
    p_gamma,
    p_first,
    p_read,
    p_before,
    p_last,
    p_flow,
    p_bounds,
    p_first_chunk,
    tokens,
    T,
    H: tl.constexpr,
    S: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """From what each chunk adds to the states before each chunk, and the last one; with REVERSE from the end back.

    With p_read, the states before the chunks on the way back, p_flow gets how much of the loss goes through the whole
    chunk: (decay of the chunk) * state before . gradient after. One program per sequence, head and BLOCK of the S
    elements of a state, which it carries; UNROLL chunks are loaded at once, as nothing else hides their latency.
    """
    NS: tl.constexpr = (S + BLOCK - 1) // BLOCK
    i_s = tl.program_id(0) % NS
    i_nh = tl.program_id(0) // NS
    i_h = i_nh % H
    begin, end, slot = sequence_at(i_nh // H, p_bounds, p_first_chunk, T, Q)
    p_gamma += i_h.to(tl.int64) * tokens
    o_s = i_s * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < S

    b_state = tl.zeros([BLOCK], dtype=tl.float32)
    if p_first is not None:
        b_state += tl.load(p_first + i_nh.to(tl.int64) * S + o_s, mask=m_s, other=0.0).to(tl.float32)
    chunks = tl.cdiv(end - begin, Q).to(tl.int32)
    for i in range(0, chunks, UNROLL):
        b_added = ()
        b_read = ()
        decays = ()
        for u in tl.static_range(UNROLL):
            i_chunk = chunks - 1 - i - u if REVERSE else i + u
            o_slot = ((slot + i_chunk).to(tl.int64) * H + i_h) * S
            m_u = (i + u < chunks) & m_s
            last = tl.minimum(begin + (i_chunk + 1) * Q, end) - 1
            log2 = tl.load(p_gamma + last, mask=i + u < chunks, other=0.0)
            decays = decays + (tl.exp2(log2),)  # noqa: RUF005 (Triton knows no unpacking)
            b_added = b_added + (tl.load(p_states + o_slot + o_s, mask=m_u, other=0.0),)  # noqa: RUF005
            if p_read is not None:
                b_read = b_read + (tl.load(p_read + o_slot + o_s, mask=m_u, other=0.0),)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            i_chunk = chunks - 1 - i - u if REVERSE else i + u
            o_slot = (slot + i_chunk).to(tl.int64) * H + i_h
            tl.store(p_before + o_slot * S + o_s, b_state.to(p_before.dtype.element_ty), (i + u < chunks) & m_s)
            b_state *= decays[u]
            if p_read is not None:
                flow = tl.sum(b_state * b_read[u].to(tl.float32), 0)
                tl.store(p_flow + o_slot * NS + i_s, flow, mask=i + u < chunks)
            b_state += b_added[u]
    if p_last is not None:
        p_last += i_nh.to(tl.int64) * S
        tl.store(p_last + o_s, b_state.to(p_last.dtype.element_ty), mask=m_s)


@triton.jit
def _scores(
    b_rows,
    b_keys,
    p_rows,
    p_keys,
    rows_stride,
    keys_stride,
    n_rows,
    n_keys,
    E: tl.constexpr,
    C: tl.constexpr,
    BE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Rows times keys^T [C, C], given the first BE columns of both."""
    # [C, BE] @ [BE, C] -> [C, C]
    b_scores = tl.dot(b_rows, tl.trans(b_keys), input_precision=PRECISION)
    for i_e in range(BE, E, BE):
        b_rows_e = _load_tile(p_rows, rows_stride, n_rows, i_e, E, C, BE).to(DOT)
        b_keys_e = _load_tile(p_keys, keys_stride, n_keys, i_e, E, C, BE).to(DOT)
        b_scores = tl.dot(b_rows_e, tl.trans(b_keys_e), b_scores, input_precision=PRECISION)
    return b_scores


@triton.jit
def _load_state(
    p_state,
    i_e,
    i_f,
    E: tl.constexpr,
    F: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """[BE, BF] of a state [E, F], or [F, E] if TRANSPOSED."""
    if TRANSPOSED:
        b_state = tl.trans(_load_tile(p_state + i_f * E, E, F - i_f, i_e, E, BF, BE))
    else:
        b_state = _load_tile(p_state + i_e * F, F, E - i_e, i_f, F, BE, BF)
    return b_state


@triton.jit
def ssd_kernel_collect(
    p_rows,
    p_keys,
    p_values,
    p_own,
    p_step,
    p_gamma,
    p_state,
    p_skip,
    p_out,
    p_ds,
    p_dg,
    p_dd,
    p_crossing,
    p_sequence,
    p_begin,
    p_end,
    rows_stride_t,
    rows_stride_h,
    keys_stride_t,
    keys_stride_h,
    values_stride_t,
    values_stride_h,
    own_stride_t,
    own_stride_h,
    slots,
    tokens,
    T,
    H: tl.constexpr,
    H_ROWS: tl.constexpr,
    H_KEYS: tl.constexpr,
    H_VALUES: tl.constexpr,
    H_OWN: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    BE: tl.constexpr,
    BF: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EXACT: tl.constexpr,
    FAST_SUMS: tl.constexpr,
    DOT: tl.constexpr,
):
    """What each token collects from the tokens of its chunk up to it, and from the state before the chunk:

        out_i = decay_i (rows_i . state) + sum over j <= i of decay_ij (rows_i . keys_j) step_j values_j + skip values_i

    With REVERSE from the tokens at and after it, and from the gradient of the state after the chunk; the step is its
    own. This is o with c, b, x for rows, keys, values; and, E and F being the widths of keys and of values,

        dc: do, x, b and the states [E, F];   dx: b, c, do and the states' gradients [F, E];   db: x, do, c, likewise

    With p_own (c for dc, x for dx) it leaves the gradient of log decays: what tokens collect across a gate, p_dg
    within the block, p_crossing across whole blocks; and with REVERSE p_ds and p_dd, gradients of step and skip.

    One program per chunk, block of C tokens, BF columns and HEADS heads, whose results are summed: one of PARTS parts
    of the heads that share an output.
    """
    NF: tl.constexpr = (F + BF - 1) // BF
    NB: tl.constexpr = Q // C
    NH: tl.constexpr = H // HEADS
    pid = tl.program_id(0)
    i_heads = pid % NH
    i_f = pid // NH % NF
    i_block = pid // (NH * NF) % NB
    i_slot = pid // (NH * NF * NB)
    i_sequence, chunk, end = chunk_at(i_slot, p_sequence, p_begin, p_end, T, Q)
    begin = chunk + i_block * C
    if (i_sequence < 0) | (begin >= end):
        return
    end = tl.minimum(end, chunk + Q)
    left = (end - begin).to(tl.int32)
    o_c = tl.arange(0, C)
    o_f = i_f * BF + tl.arange(0, BF)
    m_c = o_c < left

    b_total = tl.zeros([C, BF], dtype=tl.float32)
    for r in tl.range(HEADS, disable_licm=True):
        i_h = i_heads * HEADS + r
        o_ht = i_h.to(tl.int64) * tokens
        p_rows_h = p_rows + begin * rows_stride_t + i_h // (H // H_ROWS) * rows_stride_h
        p_keys_h = p_keys + i_h // (H // H_KEYS) * keys_stride_h
        p_keys_c = p_keys_h + begin * keys_stride_t
        p_values_h = p_values + i_h // (H // H_VALUES) * values_stride_h
        p_values_c = p_values_h + begin * values_stride_t
        p_state_h = p_state + (i_slot.to(tl.int64) * H + i_h) * E * F
        # All loads of the first products are under way before one is waited for.
        b_high, b_low = _load_gamma(p_gamma, o_ht + begin + o_c, m_c, tokens * H, EXACT)
        b_step = tl.load(p_step + o_ht + begin + o_c, mask=m_c, other=0.0)
        b_rows = _load_tile(p_rows_h, rows_stride_t, left, 0, E, C, BE).to(DOT)
        b_state = _load_state(p_state_h, 0, i_f * BF, E, F, BE, BF, TRANSPOSED).to(DOT)
        b_keys = _load_tile(p_keys_c, keys_stride_t, left, 0, E, C, BE).to(DOT)
        b_values = _load_tile(p_values_c, values_stride_t, left, i_f * BF, F, C, BF).to(DOT)
        if p_own is not None:
            p_own_h = p_own + begin * own_stride_t + i_h // (H // H_OWN) * own_stride_h
            i_crossing = ((i_f * slots + i_slot).to(tl.int64) * H + i_h) * NB + i_block

        # [C, BE] @ [BE, BF] -> [C, BF]
        b_acc = tl.dot(b_rows, b_state, input_precision=PRECISION)
        for i_e in range(BE, E, BE):
            b_rows_e = _load_tile(p_rows_h, rows_stride_t, left, i_e, E, C, BE).to(DOT)
            b_state_e = _load_state(p_state_h, i_e, i_f * BF, E, F, BE, BF, TRANSPOSED).to(DOT)
            b_acc = tl.dot(b_rows_e, b_state_e, b_acc, input_precision=PRECISION)
        # Decays to other blocks and to the state go by way of the block's edge, as products of factors of at most 1.
        if REVERSE:
            high, low = _load_gamma(p_gamma, o_ht + tl.minimum(begin + C, end) - 1, left > 0, tokens * H, EXACT)
            high_end, low_end = _load_gamma(p_gamma, o_ht + end - 1, left > 0, tokens * H, EXACT)
            b_acc *= tl.exp2(_log_ratio(high_end, low_end, high, low, EXACT))
            b_to_edge = tl.exp2(_log_ratio(high, low, b_high, b_low, EXACT))
        else:
            high, low = _load_gamma(p_gamma, o_ht + begin - 1, i_block > 0, tokens * H, EXACT)
            b_acc *= tl.exp2(high)
            b_log2 = _log_ratio(b_high, b_low, high, low, EXACT)
            b_to_edge = tl.exp2(tl.where(m_c, b_log2, float("-inf")))

        others = tl.cdiv(left, C) - 1 if REVERSE else i_block
        if p_own is not None and not REVERSE:
            # Earlier blocks lie between the state before the chunk and this one: they all get what comes from it.
            o_b = tl.arange(0, NB)
            b_flow = b_to_edge * _row_products(p_own_h, own_stride_t, left, i_f * BF, F, b_acc, C, BF)
            tl.store(p_crossing + i_crossing * NB + o_b, tl.sum(b_flow, 0) + tl.zeros([NB], tl.float32), o_b < i_block)
        for i in tl.range(others, disable_licm=True):
            i_other = i_block + others - i if REVERSE else i
            if p_own is not None and REVERSE:
                # What came so far, from the chunk's end back, passed all of the other block.
                b_flow = b_step * b_to_edge * _row_products(p_own_h, own_stride_t, left, i_f * BF, F, b_acc, C, BF)
                tl.store(p_crossing + i_crossing * NB + i_other, tl.sum(b_flow, 0))
            t_other = chunk + i_other * C
            n_other = (end - t_other).to(tl.int32)
            p_keys_o = p_keys_h + t_other * keys_stride_t
            b_keys_o = _load_tile(p_keys_o, keys_stride_t, n_other, 0, E, C, BE).to(DOT)
            p_values_o = p_values_h + t_other * values_stride_t
            b_values_o = _load_tile(p_values_o, values_stride_t, n_other, i_f * BF, F, C, BF).to(DOT)
            b_scores_o = _scores(
                b_rows, b_keys_o, p_rows_h, p_keys_o, rows_stride_t, keys_stride_t, left, n_other, E, C, BE, DOT
            )
            o_other = o_ht + t_other + o_c
            b_high_o, b_low_o = _load_gamma(p_gamma, o_other, o_c < n_other, tokens * H, EXACT)
            if REVERSE:
                b_log2_o = _log_ratio(b_high_o, b_low_o, high, low, EXACT)
                b_weight = tl.exp2(tl.where(o_c < n_other, b_log2_o, float("-inf")))
            else:
                b_weight = tl.exp2(_log_ratio(high, low, b_high_o, b_low_o, EXACT)) * tl.load(p_step + o_other)
            # [C, C] @ [C, BF] -> [C, BF]
            b_acc = tl.dot((b_scores_o * b_weight[None, :]).to(DOT), b_values_o, b_acc, input_precision=PRECISION)
        b_acc *= b_to_edge[:, None]

        b_scores = _scores(b_rows, b_keys, p_rows_h, p_keys_c, rows_stride_t, keys_stride_t, left, left, E, C, BE, DOT)
        b_between = _log_ratio(b_high[:, None], b_low[:, None], b_high[None, :], b_low[None, :], EXACT)
        if REVERSE:
            m_pairs = (o_c[:, None] <= o_c[None, :]) & m_c[None, :]
            b_scores *= tl.exp2(tl.where(m_pairs, -b_between, float("-inf")))
        else:
            m_pairs = (o_c[:, None] >= o_c[None, :]) & m_c[:, None]
            b_scores *= tl.exp2(tl.where(m_pairs, b_between, float("-inf"))) * b_step[None, :]
        if p_own is not None:
            b_flow = _row_products(p_own_h, own_stride_t, left, i_f * BF, F, b_acc, C, BF)
        b_weights = b_scores.to(DOT)
        b_acc = tl.dot(b_weights, b_values, b_acc, input_precision=PRECISION)
        if REVERSE:
            b_acc *= b_step[:, None]
        if p_skip is not None:
            b_skipped = _load_tile(p_values_c, values_stride_t, left, i_f * BF, F, C, BF)
            b_acc += tl.load(p_skip + i_h).to(tl.float32) * b_skipped.to(tl.float32)
        b_total += b_acc

        if p_own is not None:
            o_gates = (i_f * H).to(tl.int64) * tokens + o_ht + begin + o_c
            if REVERSE:
                b_own = _load_tile(p_own_h, own_stride_t, left, i_f * BF, F, C, BF).to(DOT)
                # [C, BF] @ [BF, C] -> [C, C]: row j, column i
                b_pairs = tl.dot(b_own, tl.trans(b_values), input_precision=PRECISION)
                if p_dd is not None:
                    tl.store(p_dd + i_crossing, tl.sum(tl.where(o_c[:, None] == o_c[None, :], b_pairs, 0.0)))
                b_pairs *= b_weights.to(tl.float32)
                tl.store(p_ds + o_gates, b_flow + tl.sum(b_pairs, 1), mask=m_c)
                # Row j, column k: what tokens at and after k collect of token j.
                if FAST_SUMS:
                    m_later = tl.where(o_c[:, None] >= o_c[None, :], 1.0, 0.0).to(DOT)
                    b_later = tl.dot(b_pairs.to(DOT), m_later)
                else:
                    b_later = tl.cumsum(b_pairs, 1, reverse=True)
                b_later = b_step[:, None] * (b_later + b_flow[:, None])
                b_dg = tl.sum(tl.where(o_c[:, None] < o_c[None, :], b_later, 0.0), 0)
            else:
                b_dg = tl.cumsum(b_flow, 0, reverse=True)
            tl.store(p_dg + o_gates, b_dg, mask=m_c)

    i_out = i_heads // PARTS
    NO: tl.constexpr = NH // PARTS
    p_out += ((i_heads % PARTS) * tokens + begin) * NO * F + i_out * F
    m_out = m_c[:, None] & (o_f < F)[None, :]
    tl.store(p_out + o_c[:, None] * (NO * F) + o_f[None, :], b_total.to(p_out.dtype.element_ty), mask=m_out)


class Config(NamedTuple):
    """The widest tile of the two widths of a product's right side (E or V, F or K), and how Triton compiles it."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def fitted(self, rows: int, columns: int) -> "Config":
        return self._replace(
            rows=min(self.rows, triton.next_power_of_2(rows)),
            columns=min(self.columns, triton.next_power_of_2(columns)),
        )

    @property
    def compiled(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


class PassConfig(NamedTuple):
    """Elements of the state of a program, and chunks loaded at once."""

    elements: int
    chunks: int
    num_warps: int


class Tiles(NamedTuple):
    """Tokens of a chunk, of a block and of a step of the states; configurations of the kernels by what they produce."""

    chunk: int
    block: int
    tokens: int
    states: Config
    passing: PassConfig
    o: Config
    dx: Config
    db: Config
    dc: Config


# Not yet by time: registers, spills and shared memory of what Triton 3.6 compiles for sm_90. Three programs of 168
# registers fit in a multiprocessor.
_NARROW = Tiles(
    chunk=128,
    block=64,
    tokens=128,
    states=Config(64, 64, 4, 1, 168),
    passing=PassConfig(512, 8, 4),
    o=Config(128, 64, 4, 1, 168),
    dx=Config(128, 64, 4, 1),
    db=Config(128, 64, 4, 1),
    dc=Config(128, 64, 4, 1),
)
# Products of tf32x3 split their operands in registers.
_FP32 = Tiles(
    chunk=128,
    block=32,
    tokens=32,
    states=Config(64, 64, 4, 1),
    passing=PassConfig(512, 8, 4),
    o=Config(16, 32, 4, 1),
    dx=Config(16, 16, 4, 1),
    db=Config(16, 32, 4, 1),
    dc=Config(16, 32, 4, 1),
)


def tiles_for(V: int, K: int, dtype: torch.dtype) -> Tiles:
    """Chosen by widths and dtype only, so that a sequence has the same bits in any batch."""
    return _FP32 if dtype == torch.float32 else _NARROW


class Scan:
    """One call of the op: its inputs as the kernels read them, and the launches that forward and backward share."""

    def __init__(self, inputs: Sequence[Any], tiles: Tiles | None = None) -> None:
        """Takes the op's inputs but for the last, `fixed_split`: no sum is split by what else is in the batch."""
        x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit = inputs
        self.x, self.b, self.c, self.dt = (evenly_spaced(t) for t in (x, b, c, dt))
        self.a = a.contiguous()
        self.d, self.dt_bias, self.initial_state = (
            None if t is None else t.contiguous() for t in (d, dt_bias, initial_state)
        )
        self.limited = dt_limit is not None
        self.least: float
        self.most: float
        self.least, self.most = dt_limit or (0.0, 0.0)
        self.softplus = dt_softplus
        self.B, self.T, self.H = dt.shape
        self.tokens = self.B * self.T
        self.V, self.K = x.shape[3], b.shape[3]
        self.tiles = tiles or tiles_for(self.V, self.K, x.dtype)
        self.table: ChunkTable = chunk_table(self.B, self.T, cu_seqlens, self.tiles.chunk)
        self.step = x.new_empty(self.H, self.tokens, dtype=torch.float32)
        # Log decay from the chunk's start through the token, base 2, as the sum of two floats.
        self.gamma = x.new_empty(2, self.H, self.tokens, dtype=torch.float32)

    @property
    def chunks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.table.sequence, self.table.begin, self.table.end

    def new_states(self) -> Tensor:
        return self.x.new_empty(self.table.slots, self.H, self.V, self.K, dtype=torch.float32)

    def states(self, left: Tensor, right: Tensor, out: Tensor, weigh_writes: bool) -> None:
        """Fills `out` [slots, H, V, K] fp32; with `weigh_writes` also the steps and gammas, which else are read."""
        config = self.tiles.states.fitted(self.V, self.K)
        tiles = triton.cdiv(self.V, config.rows) * triton.cdiv(self.K, config.columns)
        ssd_kernel_states[(self.table.slots * tiles * self.H,)](
            left,
            right,
            self.dt if weigh_writes else None,
            self.dt_bias,
            self.a,
            self.step,
            self.gamma,
            out,
            *self.chunks,
            self.least,
            self.most,
            *left.stride()[1:3],
            *right.stride()[1:3],
            *self.dt.stride()[1:],
            self.tokens,
            self.T,
            self.H,
            left.shape[2],
            right.shape[2],
            self.V,
            self.K,
            self.tiles.chunk,
            self.tiles.tokens,
            config.rows,
            config.columns,
            self.softplus,
            self.limited,
            dot_type(self.x.dtype),
            **config.compiled,
        )

    def carry(
        self, states: Tensor, first: Tensor | None, before: Tensor, last: Tensor | None, read: Tensor | None = None
    ) -> Tensor | None:
        """Fills `before` [slots, H, V, K] and `last` [N, H, V, K] from what the chunks add.

        Args:
            read: with it from the last chunk back; the states before the chunks.
        Returns:
            [slots, H, parts] fp32, with `read`: how much of the loss goes through whole chunks.
        """
        size, config = self.V * self.K, self.tiles.passing
        parts = triton.cdiv(size, config.elements)
        flow = None if read is None else states.new_empty(self.table.slots, self.H, parts)
        ssd_kernel_pass[(self.table.sequences * self.H * parts,)](
            states,
            self.gamma,
            first,
            read,
            before,
            last,
            flow,
            self.table.bounds,
            self.table.first_chunk,
            self.tokens,
            self.T,
            self.H,
            size,
            self.tiles.chunk,
            config.elements,
            config.chunks,
            read is not None,
            num_warps=config.num_warps,
        )
        return flow

    def collect(
        self, name: str, states: Tensor, out: Tensor, do: Tensor | None = None, gates: Sequence[Tensor | None] = ()
    ) -> None:
        """Fills `out` [parts, tokens, heads, width] with o, dx, db or dc.

        Args:
            states: [slots, H, V, K]. States before the chunks, for dx and db the gradients of those after them.
            gates: for dx and dc. ds, dg, dd and crossings, as the kernel describes them.
        """
        roles: dict[str, tuple[Any, ...]] = {
            "o": (self.c, self.b, self.x, None),
            "dx": (self.b, self.c, do, self.x),
            "db": (self.x, do, self.c, None),
            "dc": (do, self.x, self.b, self.c),
        }
        rows, keys, values, own = roles[name]
        E, F = keys.shape[3], values.shape[3]
        config = getattr(self.tiles, name).fitted(E, F)
        parts, heads = out.shape[0], self.H // (out.shape[0] * out.shape[2])
        blocks = self.table.slots * (self.tiles.chunk // self.tiles.block)
        ssd_kernel_collect[(blocks * triton.cdiv(F, config.columns) * (self.H // heads),)](
            rows,
            keys,
            values,
            own,
            self.step,
            self.gamma,
            states,
            self.d if name in ("o", "dx") else None,
            out,
            *(gates or (None,) * 4),
            *self.chunks,
            *rows.stride()[1:3],
            *keys.stride()[1:3],
            *values.stride()[1:3],
            *((0, 0) if own is None else own.stride()[1:3]),
            self.table.slots,
            self.tokens,
            self.T,
            self.H,
            rows.shape[2],
            keys.shape[2],
            values.shape[2],
            1 if own is None else own.shape[2],
            heads,
            parts,
            E,
            F,
            self.tiles.chunk,
            self.tiles.block,
            config.rows,
            config.columns,
            name in ("dx", "db"),
            name in ("o", "dx"),
            self.x.dtype == torch.float32,
            self.x.dtype == torch.bfloat16,  # products of two products pass the range of float16
            dot_type(self.x.dtype),
            **config.compiled,
        )


def evenly_spaced(x: Tensor) -> Tensor:
    """[B, T, ...] with the same stride from token to token through the whole batch, and elements [..., V] in a row."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if even and (x.ndim < 4 or x.stride(3) == 1) else x.contiguous()


def state_before_chunks(scan: Scan, added: Tensor, final_state: Tensor | None) -> Tensor:
    """[slots, H, V, K], dtype of x; undefined in unused slots. Fills step, gamma, `added` (fp32) and final_state."""
    scan.states(scan.x, scan.b, added, weigh_writes=True)
    before = torch.empty_like(added, dtype=scan.x.dtype)
    scan.carry(added, scan.initial_state, before, final_state)
    return before


def forward(*inputs: Any, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    scan = Scan(inputs[:-1], tiles)
    final_state = scan.x.new_empty(scan.table.sequences, scan.H, scan.V, scan.K, dtype=torch.float32)
    before = state_before_chunks(scan, scan.new_states(), final_state)
    o = scan.x.new_empty(1, scan.B, scan.T, scan.H, scan.V)
    scan.collect("o", before, o.flatten(1, 2))
    return o[0], final_state
