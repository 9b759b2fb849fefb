"""Forward of the RMS norm in Triton. A program takes a tile of whole rows: docs/rms_norm.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch, starts_early
from hylo_ops.common.triton_math import begin_early
from hylo_ops.common.triton_rows import as_rows, config, load_rows, rows_of

_ELEMENTS = 16  # of a thread


@triton.jit
def rms_norm_fwd_kernel_y(
    p_x,
    p_weight,
    p_residual,
    p_y,
    p_total,
    p_rstd,
    x_strides,
    rows,
    tokens,
    heads,
    eps,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin_early(EARLY)
    m_row, o_row, place = rows_of(tl.program_id(0), rows, tokens, heads, BR)
    o_d = tl.arange(0, BD)
    mask = m_row[:, None] & (o_d < D)
    o_out = o_row[:, None] * D + o_d
    b_total = load_rows(p_x, x_strides, place, o_d, mask)
    if p_residual is not None:
        b_total += tl.load(p_residual + o_out, mask=mask, other=0.0).to(tl.float32)
        b_rounded = b_total.to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_rounded, mask=mask)
        b_total = b_rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(b_total * b_total, axis=1) * (1.0 / D) + eps)
    tl.store(p_rstd + o_row, rstd, mask=m_row)
    p_w = p_weight + tl.zeros([BR, 1], dtype=tl.int32) + o_d
    b_y = b_total * rstd[:, None] * tl.load(p_w, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=mask)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the total (of no size without a residual), and what each row of it is multiplied with."""
    D = x.shape[-1]
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = None
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(residual)
    if y.numel():
        x, (_, tokens, heads), strides = as_rows(x)
        rows = rstd.numel()
        (BR, BD, num_warps), early = config(D, _ELEMENTS), starts_early()
        launch(
            rms_norm_fwd_kernel_y,
            (ceil_div(rows, BR), 1, 1),
            (x, weight.contiguous(), residual, y, total, rstd),
            (strides, rows, tokens, heads, float(eps)),
            (D, BR, BD, early),
            num_warps,
            early=early,
        )
    return y, x.new_empty(0) if total is None else total, rstd
