"""Decode step of the short causal convolution in Triton: one launch, the state updated in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.causal_conv1d.triton_fwd import activate, load_channels
from hylo_ops.common.triton_launch import ceil_div, launch, next_power_of_2, starts_early
from hylo_ops.common.triton_math import begin_early

_BD = 128
_NUM_WARPS = 4


@triton.jit
def causal_conv1d_fwd_kernel_step(
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_indices,
    p_y,
    x_stride_b,
    state_stride_p,
    STRIDE_D: tl.constexpr,
    STRIDE_W: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    BD: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program per sequence and BD channels; the strides of a state are constants, so that it is read in rows."""
    begin_early(EARLY)
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    p_y += i_b * D + o_d
    row = i_b
    if p_indices is not None:
        row = tl.load(p_indices + i_b).to(tl.int64)
        if row < 0:
            tl.store(p_y, tl.zeros([BD], dtype=p_y.dtype.element_ty), mask=m_d)
            return
    o_w = tl.arange(0, BW)[None, :]
    m_dw = m_d[:, None] & (o_w < W)
    p_state += row * state_stride_p + o_d[:, None] * STRIDE_D + o_w * STRIDE_W
    b_state = tl.load(p_state + STRIDE_W, mask=m_dw & (o_w < W - 1), other=0.0)
    b_x = tl.load(p_x + i_b * x_stride_b + o_d[:, None], mask=m_d[:, None], other=0.0)
    b_state = tl.where(o_w == W - 1, b_x.to(p_state.dtype.element_ty), b_state)
    b_weight = tl.load(p_weight + o_d[:, None] * W + o_w, mask=m_dw, other=0.0).to(tl.float32)
    tl.debug_barrier()  # columns move by one: all are read before one is written
    tl.store(p_state, b_state, mask=m_dw)
    b_z = load_channels(p_bias, o_d, m_d) + tl.sum(b_state.to(tl.float32) * b_weight, 1)
    tl.store(p_y, activate(b_z, SILU, PRECISE).to(p_y.dtype.element_ty), mask=m_d)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The op's forward; x may be strided along B, the state along all dims."""
    x = x if x.stride(2) == 1 else x.contiguous()
    (B, _, D), W = x.shape, weight.shape[1]
    y = x.new_empty(B, 1, D)
    bias = None if bias is None else bias.contiguous()
    indices = None if state_indices is None else state_indices.contiguous()
    (stride_p, stride_d, stride_w), early = state.stride(), starts_early()
    launch(
        causal_conv1d_fwd_kernel_step,
        (B, ceil_div(D, _BD), 1),
        (x, weight.contiguous(), bias, state, indices, y),
        (x.stride(0), stride_p),
        (stride_d, stride_w, D, W, next_power_of_2(W), _BD, activation == "silu", x.dtype == torch.float32, early),
        _NUM_WARPS,
        early=early,
    )
    return y
