"""Forward of the gated RMS norm in Triton. A program takes a tile of whole rows: docs/gated_rms_norm.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.common.triton_rows import config, load_rows, rows_of, sigmoid

_ELEMENTS = 16  # of a thread


@triton.jit
def gated_rms_norm_fwd_kernel_y(
    p_x,
    p_gate,
    p_weight,
    p_y,
    x_strides,
    gate_strides,
    weight_stride_h,
    rows,
    tokens,
    heads,
    eps,
    V: tl.constexpr,
    NORM_BEFORE_GATE: tl.constexpr,
    PRECISE: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, BR)
    o_v = tl.arange(0, BV)
    mask = m_row[:, None] & (o_v < V)
    b_u = load_rows(p_x, x_strides, place, o_v, mask)
    b_gate = load_rows(p_gate, gate_strides, place, o_v, mask)
    b_gate *= sigmoid(b_gate, PRECISE)
    if not NORM_BEFORE_GATE:
        b_u *= b_gate
    scale = tl.rsqrt(tl.sum(b_u * b_u, axis=1) * (1.0 / V) + eps)
    p_w = p_weight + (place[2] * weight_stride_h)[:, None] + o_v
    b_y = b_u * scale[:, None] * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        b_y *= b_gate
    tl.store(p_y + o_row[:, None] * V + o_v, b_y.to(p_y.dtype.element_ty), mask=mask)


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    """The op's forward; all but the last dim may be strided."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    B, T, H, V = x.shape
    rows = B * T * H
    if not y.numel():
        return y
    BR, BV, num_warps = config(V, _ELEMENTS)
    weight_stride = weight.stride(0) if weight.ndim == 2 else 0
    launch(
        gated_rms_norm_fwd_kernel_y,
        (ceil_div(rows, BR), 1, 1),
        (x, gate, weight, y),
        (x.stride()[:3], gate.stride()[:3], weight_stride, rows, T, H, float(eps)),
        (V, norm_before_gate, x.dtype == torch.float32, BR, BV),
        num_warps,
    )
    return y
