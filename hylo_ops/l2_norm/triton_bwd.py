"""Backward of the unit vectors in Triton: one pass over x and dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.common.triton_rows import as_rows, config, load_rows, rows_of

_ELEMENTS = 8  # of a thread


@triton.jit
def l2_norm_bwd_kernel_dx(
    p_dy,
    p_x,
    p_scale,
    p_dx,
    x_strides,
    rows,
    tokens,
    heads,
    K: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, BR)
    o_k = tl.arange(0, BK)
    mask = m_row[:, None] & (o_k < K)
    scale = tl.load(p_scale + o_row, mask=m_row, other=0.0)[:, None]
    b_n = load_rows(p_x, x_strides, place, o_k, mask) * scale
    b_dy = tl.load(p_dy + o_row[:, None] * K + o_k, mask=mask, other=0.0).to(tl.float32)
    pull = tl.sum(b_n * b_dy, axis=1)[:, None]
    b_dx = (b_dy - b_n * pull) * scale
    tl.store(p_dx + o_row[:, None] * K + o_k, b_dx.to(p_dx.dtype.element_ty), mask=mask)


def backward(dy: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    K = x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = scale.numel()
    if rows:
        x, (_, tokens, heads), strides = as_rows(x)
        BR, BK, num_warps = config(K, _ELEMENTS)
        launch(
            l2_norm_bwd_kernel_dx,
            (ceil_div(rows, BR), 1, 1),
            (dy.contiguous(), x, scale, dx),
            (strides, rows, tokens, heads),
            (K, BR, BK),
            num_warps,
        )
    return dx
