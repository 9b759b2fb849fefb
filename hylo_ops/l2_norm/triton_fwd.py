"""Forward of the unit vectors in Triton. A program takes a tile of whole rows: docs/l2_norm.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.common.triton_rows import as_rows, config, load_rows, rows_of

_ELEMENTS = 16  # of a thread


@triton.jit
def l2_norm_fwd_kernel_y(
    p_x, p_y, p_scale, strides, rows, tokens, heads, eps, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, BR)
    o_k = tl.arange(0, BK)
    mask = m_row[:, None] & (o_k < K)
    b_x = load_rows(p_x, strides, place, o_k, mask)
    scale = tl.rsqrt(tl.sum(b_x * b_x, axis=1) + eps)
    b_y = b_x * scale[:, None]
    tl.store(p_y + o_row[:, None] * K + o_k, b_y.to(p_y.dtype.element_ty), mask=mask)
    tl.store(p_scale + o_row, scale, mask=m_row)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and what each row of x is multiplied with; all but the last dim may be strided."""
    K = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rows = scale.numel()
    if rows:
        x, (_, tokens, heads), strides = as_rows(x)
        BR, BK, num_warps = config(K, _ELEMENTS)
        launch(
            l2_norm_fwd_kernel_y,
            (ceil_div(rows, BR), 1, 1),
            (x, y, scale),
            (strides, rows, tokens, heads, float(eps)),
            (K, BR, BK),
            num_warps,
        )
    return y, scale
