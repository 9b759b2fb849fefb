"""Forward of SwiGLU in Triton, and the tiles that it shares with the backward: docs/swiglu.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.common.triton_rows import Config, as_rows, config, load_rows, rows_of, silu

_ELEMENTS = 16  # of a thread
_MOST_COLUMNS = 4 * 32 * _ELEMENTS  # of a tile


def tiles_of(rows: int, N: int) -> tuple[Config, int, int]:
    """A tile, how many lie beside each other in a row, and how many there are."""
    tile = config(min(N, _MOST_COLUMNS), _ELEMENTS)
    beside = ceil_div(N, tile.BV)
    return tile, beside, beside * ceil_div(rows, tile.BR)


@triton.jit
def place_of(i_tile, beside, rows, tokens, heads, N, BR: tl.constexpr, BN: tl.constexpr):
    """Of a tile: rows' numbers among all and their places, columns, and which elements there are."""
    i_row = i_tile // beside
    m_row, o_row, place = rows_of(i_row, rows, tokens, heads, BR)
    o_n = (i_tile - i_row * beside) * BN + tl.arange(0, BN)
    return o_row, place, o_n, m_row[:, None] & (o_n < N)


@triton.jit
def swiglu_fwd_kernel_y(
    p_gate_up,
    p_y,
    strides,
    rows,
    tokens,
    heads,
    beside,
    N,
    PRECISE: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    o_row, place, o_n, mask = place_of(tl.program_id(0), beside, rows, tokens, heads, N, BR, BN)
    b_gate = load_rows(p_gate_up, strides, place, o_n, mask)
    b_up = load_rows(p_gate_up + N, strides, place, o_n, mask)
    b_y = silu(b_gate, PRECISE) * b_up
    tl.store(p_y + o_row[:, None] * N + o_n, b_y.to(p_y.dtype.element_ty), mask=mask)


def forward(gate_up: Tensor) -> Tensor:
    """The op's forward; all but the last dim may be strided."""
    N = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], N))
    if not y.numel():
        return y
    rows = y.numel() // N
    gate_up, (_, tokens, heads), strides = as_rows(gate_up)
    (BR, BN, num_warps), beside, tiles = tiles_of(rows, N)
    launch(
        swiglu_fwd_kernel_y,
        (tiles, 1, 1),
        (gate_up, y),
        (strides, rows, tokens, heads, beside, N),
        (y.dtype == torch.float32, BR, BN),
        num_warps,
    )
    return y
