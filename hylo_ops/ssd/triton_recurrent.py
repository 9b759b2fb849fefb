"""Decode step of the SSD scan in Triton: one launch, the state updated in place."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2
from hylo_ops.ssd.triton_chunk_fwd import step_size

# Bytes of the state of a program, a warp. Not yet by time.
_TILE_BYTES = 2048


@triton.jit
def ssd_fwd_kernel_step(
    p_x,
    p_dt,
    p_a,
    p_b,
    p_c,
    p_state,
    p_d,
    p_dt_bias,
    p_indices,
    p_o,
    least,
    most,
    x_stride_b,
    x_stride_h,
    x_stride_v,
    dt_stride_b,
    dt_stride_h,
    b_stride_b,
    b_stride_h,
    b_stride_k,
    c_stride_b,
    c_stride_h,
    c_stride_k,
    state_stride_p,
    state_stride_h,
    state_stride_v,
    state_stride_k,
    a_stride,
    d_stride,
    dt_bias_stride,
    H: tl.constexpr,
    H_X: tl.constexpr,
    H_B: tl.constexpr,
    H_C: tl.constexpr,
    V: tl.constexpr,
    K: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """One program per sequence, head and BV rows of the state."""
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_h = pid // NV % H
    i_b = (pid // (NV * H)).to(tl.int64)
    o_v = pid % NV * BV + tl.arange(0, BV)
    o_k = tl.arange(0, BK)
    m_v = o_v < V
    m_k = o_k < K
    p_ov = p_o + (i_b * H + i_h) * V + o_v
    row = i_b
    if p_indices is not None:
        row = tl.load(p_indices + i_b).to(tl.int64)
        if row < 0:
            tl.store(p_ov, tl.zeros([BV], dtype=p_o.dtype.element_ty), mask=m_v)
            return
    p_s = p_state + row * state_stride_p + i_h * state_stride_h
    p_s += o_v[:, None] * state_stride_v + o_k[None, :] * state_stride_k
    m_s = m_v[:, None] & m_k[None, :]
    b_s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float32)
    p_xv = p_x + i_b * x_stride_b + i_h // (H // H_X) * x_stride_h + o_v * x_stride_v
    p_bk = p_b + i_b * b_stride_b + i_h // (H // H_B) * b_stride_h + o_k * b_stride_k
    p_ck = p_c + i_b * c_stride_b + i_h // (H // H_C) * c_stride_h + o_k * c_stride_k
    b_x = tl.load(p_xv, mask=m_v, other=0.0).to(tl.float32)
    b_b = tl.load(p_bk, mask=m_k, other=0.0).to(tl.float32)
    b_c = tl.load(p_ck, mask=m_k, other=0.0).to(tl.float32)
    dt = tl.load(p_dt + i_b * dt_stride_b + i_h * dt_stride_h).to(tl.float32)
    if p_dt_bias is not None:
        dt += tl.load(p_dt_bias + i_h * dt_bias_stride).to(tl.float32)
    step = step_size(dt, least, most, SOFTPLUS, LIMITED)
    decay = tl.exp(step * tl.load(p_a + i_h * a_stride).to(tl.float32))

    b_s = decay * b_s + (step * b_x)[:, None] * b_b[None, :]
    b_o = tl.sum(b_s * b_c[None, :], 1)
    if p_d is not None:
        b_o += tl.load(p_d + i_h * d_stride).to(tl.float32) * b_x
    tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_s)
    tl.store(p_ov, b_o.to(p_o.dtype.element_ty), mask=m_v)


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
    tile_bytes: int = _TILE_BYTES,
    num_warps: int = 1,
) -> Tensor:
    """The op's forward; every tensor may be strided."""
    (B, _, H_X, V), (_, _, H_B, K), (_, _, H) = x.shape, b.shape, dt.shape
    o = x.new_empty(B, 1, H, V)
    BK = next_power_of_2(K)
    BV = min(max(tile_bytes // (BK * state.element_size()), 1), next_power_of_2(V))
    least, most = dt_limit or (0.0, 0.0)
    indices = None if state_indices is None else state_indices.contiguous()
    x_b, _, *x_strides = x.stride()
    dt_b, _, dt_h = dt.stride()
    b_b, _, *b_strides = b.stride()
    c_b, _, *c_strides = c.stride()
    vector_strides = (a.stride(0), 0 if d is None else d.stride(0), 0 if dt_bias is None else dt_bias.stride(0))
    strides = (x_b, *x_strides, dt_b, dt_h, b_b, *b_strides, c_b, *c_strides, *state.stride(), *vector_strides)
    launch(
        ssd_fwd_kernel_step,
        (B * H * ceil_div(V, BV), 1, 1),
        (x, dt, a, b, c, state, d, dt_bias, indices, o),
        (float(least), float(most), *strides),
        (H, H_X, H_B, c.shape[2], V, K, BV, BK, dt_softplus, dt_limit is not None),
        num_warps,
    )
    return o
