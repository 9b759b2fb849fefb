"""Backward of SwiGLU in Triton: both halves of the gradient out of one pass over gate_up and dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import launch
from hylo_ops.common.triton_rows import as_rows, load_rows, sigmoid
from hylo_ops.swiglu.triton_fwd import place_of, tiles_of


@triton.jit
def swiglu_bwd_kernel_dgate_up(
    p_dy,
    p_gate_up,
    p_dgate_up,
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
    b_dy = tl.load(p_dy + o_row[:, None] * N + o_n, mask=mask, other=0.0).to(tl.float32)
    b_open = sigmoid(b_gate, PRECISE)
    b_silu = b_gate * b_open
    b_dgate = b_dy * b_up * tl.fma(b_silu, 1.0 - b_open, b_open)
    p_d = p_dgate_up + o_row[:, None] * (2 * N) + o_n
    tl.store(p_d, b_dgate.to(p_dgate_up.dtype.element_ty), mask=mask)
    tl.store(p_d + N, (b_dy * b_silu).to(p_dgate_up.dtype.element_ty), mask=mask)


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate_up, in its dtype."""
    dgate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if not dgate_up.numel():
        return dgate_up
    N = dy.shape[-1]
    rows = dy.numel() // N
    gate_up, (_, tokens, heads), strides = as_rows(gate_up)
    (BR, BN, num_warps), beside, tiles = tiles_of(rows, N)
    launch(
        swiglu_bwd_kernel_dgate_up,
        (tiles, 1, 1),
        (dy.contiguous(), gate_up, dgate_up),
        (strides, rows, tokens, heads, beside, N),
        (dy.dtype == torch.float32, BR, BN),
        num_warps,
    )
    return dgate_up
