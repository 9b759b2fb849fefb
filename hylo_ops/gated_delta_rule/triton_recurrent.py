"""Decode step of the gated delta rule in Triton: one launch, the state updated in place."""

import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_math import softplus
from hylo_ops.gated_delta_rule.activation import Activation

# Chosen on 2026-11-24: 32 columns of a float32 state are whole sectors, and small programs fill the GPU at batch 1.
_BV = 32
_NORM_EPS = tl.constexpr(1e-6)  # of the sum of squares
_NUM_WARPS = {16: 1, 32: 1, 64: 2, 128: 4, 256: 8}  # by the power of two that holds K


@triton.jit
def gated_delta_rule_fwd_kernel_step(
    p_q,
    p_k,
    p_v,
    p_g,
    p_beta,
    p_state,
    p_indices,
    p_o,
    p_a_log,
    p_dt_bias,
    scale,
    most_strength,
    q_stride_b,
    q_stride_g,
    k_stride_b,
    k_stride_g,
    v_stride_b,
    v_stride_h,
    g_stride_b,
    g_stride_h,
    beta_stride_b,
    beta_stride_h,
    state_stride_p,
    state_stride_h,
    a_log_stride,
    dt_bias_stride,
    QK_L2NORM: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One program per sequence, value head and BV columns of the state. With p_a_log, g and beta are raw a and b."""
    i_b = (tl.program_id(0) // H).to(tl.int64)
    i_h = tl.program_id(0) % H
    i_g = i_h // (H // G)
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v
    p_ov = p_o + (i_b * H + i_h) * V + o_v
    row = i_b
    if p_indices is not None:
        row = tl.load(p_indices + i_b).to(tl.int64)
        if row < 0:
            tl.store(p_ov, tl.zeros([BV], dtype=p_o.dtype.element_ty), mask=m_v)
            return
    b_q = tl.load(p_q + i_b * q_stride_b + i_g * q_stride_g + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * k_stride_b + i_g * k_stride_g + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * v_stride_b + i_h * v_stride_h + o_v, mask=m_v, other=0.0).to(tl.float32)
    g = tl.load(p_g + i_b * g_stride_b + i_h * g_stride_h).to(tl.float32)
    beta = tl.load(p_beta + i_b * beta_stride_b + i_h * beta_stride_h).to(tl.float32)
    if p_a_log is not None:
        x = g + tl.load(p_dt_bias + i_h * dt_bias_stride).to(tl.float32)
        g = -tl.exp(tl.load(p_a_log + i_h * a_log_stride).to(tl.float32)) * softplus(x)
        beta = most_strength / (1.0 + tl.exp(-beta))
    if QK_L2NORM:
        b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + _NORM_EPS)
        b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + _NORM_EPS)
    gate = tl.exp(g)

    p_s = p_state + row * state_stride_p + i_h * state_stride_h + o_k[:, None] * V + o_v
    b_s = gate * tl.load(p_s, mask=m_kv, other=0.0).to(tl.float32)
    # [BV]: what the state lacks of the value, for this key
    b_delta = beta * (b_v - tl.sum(b_s * b_k[:, None], axis=0))
    b_s += b_k[:, None] * b_delta
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_kv)
    b_o = scale * tl.sum(b_s * b_q[:, None], axis=0)
    tl.store(p_ov, b_o.to(p_o.dtype.element_ty), mask=m_v)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    activation: Activation | None = None,
) -> Tensor:
    """The op's forward; rows of a head's state are contiguous, all else may be strided."""
    a_log, dt_bias, qk_l2norm, most_strength = activation or (None, None, False, 1.0)
    (B, _, G, K), (_, _, H, V) = q.shape, v.shape
    o = v.new_empty(B, 1, H, V)
    BK, BV = triton.next_power_of_2(K), min(_BV, triton.next_power_of_2(V))
    gated_delta_rule_fwd_kernel_step[(B * H, triton.cdiv(V, BV))](
        q,
        k,
        v,
        g,
        beta,
        state,
        None if state_indices is None else state_indices.contiguous(),
        o,
        a_log,
        dt_bias,
        scale,
        most_strength,
        q.stride(0),
        q.stride(2),
        k.stride(0),
        k.stride(2),
        v.stride(0),
        v.stride(2),
        g.stride(0),
        g.stride(2),
        beta.stride(0),
        beta.stride(2),
        state.stride(0),
        state.stride(1),
        0 if a_log is None else a_log.stride(0),
        0 if dt_bias is None else dt_bias.stride(0),
        qk_l2norm,
        G,
        H,
        K,
        V,
        BK,
        BV,
        num_warps=_NUM_WARPS[BK],
    )
    return o
