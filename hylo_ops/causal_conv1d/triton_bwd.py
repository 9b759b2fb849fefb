"""Backward of the short causal convolution in Triton: all gradients out of one pass over x and dy.

A walk computes the gradient dz of the pre-activation anew and keeps W of them, so dx is written once and from
registers. What sees the states belongs to edge programs, as in the forward: docs/causal_conv1d.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.causal_conv1d.triton_fwd import (
    MOST_EDGES,
    Config,
    access,
    as_rows,
    bounds_of,
    convolve,
    in_float32,
    load_channels,
    load_column,
    load_columns,
    load_first_inputs,
    load_inputs,
    place_of,
    sequences_of,
    sigmoid,
    tile_of,
)

_REDUCED_COLUMNS = 64  # of a program that adds up parts
_REDUCED_ROWS = 64


@triton.jit
def _gradient_of_z(b_dy, b_z, SILU: tl.constexpr, PRECISE: tl.constexpr):
    """dy times the derivative of the activation, s + z s (1 - s) for SiLU."""
    if SILU:
        b_s = sigmoid(b_z, PRECISE)
        b_dy *= tl.fma(b_s, tl.fma(-b_s, b_z, b_z), b_s)
    return b_dy


@triton.jit
def _gradient_of_x(b_weight, b_dz, W: tl.constexpr):
    """Of the input that the W gradients' outputs have in common, oldest first: the newest weight meets the oldest."""
    b_dx = b_weight[W - 1] * b_dz[0]
    for w in tl.static_range(1, W):
        b_dx = tl.fma(b_weight[W - 1 - w], b_dz[w], b_dx)
    return b_dx


@triton.jit
def _add_products(b_dweight, b_dz, b_window, W: tl.constexpr):
    b_sums = ()
    for w in tl.static_range(W):
        b_sums += (tl.fma(b_dz, b_window[w], b_dweight[w]),)
    return b_sums


@triton.jit
def _zeros(shape: tl.constexpr, W: tl.constexpr):
    b_zeros = ()
    for _ in tl.static_range(W):
        b_zeros += (tl.zeros(shape, dtype=tl.float32),)
    return b_zeros


@triton.jit
def _gradients_of_z(
    b_inputs,
    p_dy,
    dy_stride,
    b_weight,
    b_bias,
    first,
    length,
    o_d,
    m_d,
    COUNT: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """dz [BD] of COUNT outputs of a sequence, zeros where it has none, from their inputs, W - 1 more."""
    b_dys = load_inputs(p_dy, dy_stride, o_d, m_d, first, length, COUNT)
    b_dz = ()
    for i in tl.static_range(COUNT):
        b_z = convolve(b_weight, b_bias, b_inputs[i : i + W], W)
        b_one = _gradient_of_z(b_dys[i].to(tl.float32), b_z, SILU, PRECISE)
        b_dz += (tl.where(first + i < length, b_one, 0.0),)
    return b_dz


@triton.jit
def _edge(
    p_x,
    x_stride,
    p_dy,
    dy_stride,
    p_dfinal,
    b_weight,
    b_bias,
    p_state,
    p_dx,
    dx_stride,
    p_dstate,
    b_dweight,
    b_dbias,
    length,
    o_d,
    m_d,
    BD: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Of one sequence: gradients of the initial state, the first W - 1 inputs and the last W, which the final state
    holds; and what the first W - 1 tokens add to those of weight and bias."""
    b_inputs = load_first_inputs(p_x, x_stride, p_state, o_d, m_d, length, 2 * W - 2, W)
    outputs = (p_dy, dy_stride, b_weight, b_bias)
    b_dz = _gradients_of_z(b_inputs, *outputs, 0, length, o_d, m_d, 2 * W - 2, W, SILU, PRECISE)
    for t in tl.static_range(W - 1):
        b_dweight = _add_products(b_dweight, b_dz[t], b_inputs[t : t + W], W)
        b_dbias += b_dz[t]
    b_dz = _zeros([BD], W) + b_dz  # from -W on
    for i in tl.static_range(W if p_dstate is None else 0, 2 * W - 1):
        b_dx = _gradient_of_x(b_weight, b_dz[i : i + W], W)
        b_dx += load_column(p_dfinal, i - length, o_d, m_d, W).to(tl.float32)
        if i < W:
            tl.store(p_dstate + o_d * W + i, b_dx.to(p_dstate.dtype.element_ty), mask=m_d)
        else:
            p_q = p_dx + (i - W) * dx_stride + o_d
            tl.store(p_q, b_dx.to(p_dx.dtype.element_ty), mask=m_d & (i - W < length))

    # Of a tail that reaches into the head no more is stored, so the initial state is not asked for.
    first = length - W
    b_inputs = load_inputs(p_x, x_stride, o_d, m_d, first - W + 1, length, 2 * W - 1)
    b_inputs = in_float32(b_inputs, 2 * W - 1)
    b_dz = _gradients_of_z(b_inputs, *outputs, first, length, o_d, m_d, W, W, SILU, PRECISE)
    b_dz = b_dz + _zeros([BD], W - 1)
    for i in tl.static_range(W):
        b_dx = _gradient_of_x(b_weight, b_dz[i : i + W], W)
        b_dx += load_column(p_dfinal, i, o_d, m_d, W).to(tl.float32)
        p_q = p_dx + (first + i) * dx_stride + o_d
        tl.store(p_q, b_dx.to(p_dx.dtype.element_ty), mask=m_d & (first + i >= W - 1))
    return b_dweight, b_dbias


@triton.jit
def _load_rows(p_x, o_t, m_d, T, INNER: tl.constexpr):
    """[R, BD]; zeros from T on, which an INNER walk does not reach."""
    return tl.load(p_x, mask=m_d if INNER else m_d & ((o_t >= 0) & (o_t < T))[:, None], other=0.0)


@triton.jit
def _walk(
    p_x,
    x_stride,
    p_dy,
    dy_stride,
    b_weight,
    b_bias,
    p_dx,
    p_bounds,
    o_t,
    m_d,
    first,
    last,
    T,
    L,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    INNER: tl.constexpr,
):
    """dx of L tokens from o_t [R] on, which p_x, p_dy and p_dx [R, BD] point at.

    INNER: none of them is an edge's (of a sequence's first W - 1 or last W). Otherwise those that are not count, of the
    sequences first..last.
    Returns:
        What the L tokens from o_t + W - 1 on add to the gradients of weight and bias, [R, BD] each.
    """
    b_window = ()
    for w in tl.static_range(W - 1):
        o_x = o_t + (w - W + 1)
        b_x = _load_rows(p_x + (w - W + 1) * x_stride, o_x, m_d, T, INNER)
        b_window += (b_x.to(tl.float32),)
    b_dz = ()
    for w in tl.static_range(W - 1):
        b_x = _load_rows(p_x, o_t + w, m_d, T, INNER)
        b_dy = _load_rows(p_dy, o_t + w, m_d, T, INNER).to(tl.float32)
        b_window += (b_x.to(tl.float32),)
        b_dz += (_gradient_of_z(b_dy, convolve(b_weight, b_bias, b_window, W), SILU, PRECISE),)
        b_window = b_window[1:]
        p_x += x_stride
        p_dy += dy_stride
    b_dweight = _zeros([R, BD], W)
    b_dbias = tl.zeros([R, BD], dtype=tl.float32)
    for i in tl.range(0, L, U, num_stages=STAGES if INNER else 1):
        b_xs = ()
        b_dys = ()
        for u in tl.static_range(U):
            o_x = o_t + (i + u + W - 1)
            b_xs += (_load_rows(p_x + u * x_stride, o_x, m_d, T, INNER),)
            b_dys += (_load_rows(p_dy + u * dy_stride, o_x, m_d, T, INNER),)
        for u in tl.static_range(U):
            b_window += (b_xs[u].to(tl.float32),)
            b_z = convolve(b_weight, b_bias, b_window, W)
            b_dz += (_gradient_of_z(b_dys[u].to(tl.float32), b_z, SILU, PRECISE),)
            b_dx = _gradient_of_x(b_weight, b_dz, W)
            b_counted = b_dz[W - 1]
            m_dx = m_d
            if not INNER:
                o_dx = o_t + (i + u)
                begin, end = bounds_of(o_dx, p_bounds, first, last, T)
                m_dx = m_d & ((o_dx - begin >= W - 1) & (o_dx + W < end))[:, None]
                begin, _ = bounds_of(o_dx + W - 1, p_bounds, first, last, T)
                b_counted = tl.where((o_dx - begin >= 0)[:, None], b_counted, 0.0)
            tl.store(p_dx + u * D, b_dx.to(p_dx.dtype.element_ty), mask=m_dx)
            b_dweight = _add_products(b_dweight, b_counted, b_window, W)
            b_dbias += b_counted
            b_window = b_window[1:]
            b_dz = b_dz[1:]
        p_x += U * x_stride
        p_dy += U * dy_stride
        p_dx += U * D
    return b_dweight, b_dbias


@triton.jit
def _store_parts(p_parts, b_dweight, b_dbias, o_d, m_d, D: tl.constexpr, W: tl.constexpr):
    for w in tl.static_range(W):
        tl.store(p_parts + w * D + o_d, b_dweight[w], mask=m_d)
    tl.store(p_parts + W * D + o_d, b_dbias, mask=m_d)


@triton.jit(do_not_specialize=["T", "N", "edges", "L", "x_stride_b", "x_stride_t", "dy_stride_b", "dy_stride_t"])
def causal_conv1d_bwd_kernel_dx(
    p_x,
    p_dy,
    p_dfinal,
    p_weight,
    p_bias,
    p_state,
    p_bounds,
    p_dx,
    p_dstate,
    p_parts,
    T,
    N,
    edges,
    L,
    x_stride_b,
    x_stride_t,
    dy_stride_b,
    dy_stride_t,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
    VEC: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Programs as in the forward; each has a row [W + 1, D] for what it adds to the gradients of weight and bias."""
    ND: tl.constexpr = (D + BD - 1) // BD
    i_d = tl.program_id(0) % ND
    i_row = tl.program_id(0) // ND
    x_stride_b = x_stride_b.to(tl.int64) * VEC
    x_stride_t = x_stride_t.to(tl.int64) * VEC
    dy_stride_b = dy_stride_b.to(tl.int64) * VEC
    dy_stride_t = dy_stride_t.to(tl.int64) * VEC
    dx_stride_t = tl.full([], D, tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D if D % BD else tl.full([BD], True, tl.int1)
    b_weight = in_float32(load_columns(p_weight, o_d, m_d, W, BD), W)
    b_bias = load_channels(p_bias, o_d, m_d)
    p_parts += dx_stride_t * (W + 1) * i_row
    if i_row < edges:
        b_dweight = _zeros([BD], W)
        b_dbias = tl.zeros([BD], dtype=tl.float32)
        for n in range(i_row, N, edges):
            row, begin, end = place_of(n, p_bounds, T)
            o_state = dx_stride_t * W * n
            b_dweight, b_dbias = _edge(
                p_x + (x_stride_b * row + x_stride_t * begin),
                x_stride_t,
                p_dy + (dy_stride_b * row + dy_stride_t * begin),
                dy_stride_t,
                p_dfinal + o_state,
                b_weight,
                b_bias,
                p_state + o_state if p_state is not None else None,
                p_dx + (dx_stride_t * T * row + dx_stride_t * begin),
                dx_stride_t,
                p_dstate + o_state if p_dstate is not None else None,
                b_dweight,
                b_dbias,
                end - begin,
                o_d,
                m_d,
                BD,
                W,
                SILU,
                PRECISE,
            )
        _store_parts(p_parts, b_dweight, b_dbias, o_d, m_d, D, W)
        return
    row, begin_tile, o_t = tile_of(i_row - edges, T, L, R)
    begin, end, first, last = sequences_of(begin_tile, R * L + W, p_bounds, N, T)
    p_x += x_stride_b * row + o_t[:, None] * x_stride_t + o_d[None, :]
    p_dy += dy_stride_b * row + o_t[:, None] * dy_stride_t + o_d[None, :]
    p_dx += dx_stride_t * T * row + o_t[:, None] * dx_stride_t + o_d[None, :]
    b_weight = as_rows(b_weight, W)
    b_bias = b_bias[None, :]
    rows = (p_x, x_stride_t, p_dy, dy_stride_t, b_weight, b_bias, p_dx)
    tile = (p_bounds, o_t, m_d[None, :], first, last, T, L)
    if (begin_tile - begin >= W - 1) & (begin_tile + R * L + W <= end):
        b_dweight, b_dbias = _walk(*rows, *tile, D, W, R, BD, U, STAGES, SILU, PRECISE, True)
    else:
        b_dweight, b_dbias = _walk(*rows, *tile, D, W, R, BD, U, STAGES, SILU, PRECISE, False)
    b_sums = ()
    for w in tl.static_range(W):
        b_sums += (tl.sum(b_dweight[w], 0),)
    _store_parts(p_parts, b_sums, tl.sum(b_dbias, 0), o_d, m_d, D, W)


@triton.jit(do_not_specialize=["rows"])
def causal_conv1d_bwd_kernel_dweight(
    p_parts,
    p_dweight,
    p_dbias,
    rows,
    D: tl.constexpr,
    W: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums of parts [rows, W + 1, D], always in one order. One program per BC columns."""
    o_r = tl.arange(0, BR)
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < (W + 1) * D
    p_parts += o_r[:, None] * ((W + 1) * D) + o_c[None, :]
    b_sum = tl.zeros([BR, BC], dtype=tl.float32)
    for i in range(0, rows, BR):
        b_sum += tl.load(p_parts, mask=(i + o_r < rows)[:, None] & m_c[None, :], other=0.0)
        p_parts += BR * (W + 1) * D
    b_total = tl.sum(b_sum, 0)
    o_w = o_c // D
    o_weight = o_c % D * W + o_w
    tl.store(p_dweight + o_weight, b_total.to(p_dweight.dtype.element_ty), mask=m_c & (o_w < W))
    if p_dbias is not None:
        tl.store(p_dbias + o_c % D, b_total.to(p_dbias.dtype.element_ty), mask=m_c & (o_w == W))


# The fastest of seven on an H100 at 8192 tokens x 2304 channels, bf16: 58.7 us, a copy of dy to dx takes 27.1.
CONFIG = Config(channels=64, elements=4, length=32, ahead=4, stages=3, num_warps=4)


def backward(
    grads: list[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    config: Config | None = None,
) -> list[Tensor]:
    """Gradients of x, weight and, where given, bias and initial_state, in their dtypes.

    Args:
        grads: gradients of y and of final_state; the first may be strided along B and T, as may x.
    """
    x, dy = (t if t.stride(2) == 1 else t.contiguous() for t in (x, grads[0]))
    (B, T, D), W = x.shape, weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx, dweight, dbias, dstate = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (x, weight, bias, initial_state)
    )
    found = [t for t in (dx, dweight, dbias, dstate) if t is not None]
    if not D:
        return found
    config = (config or CONFIG).fitted(B, T, D)
    edges = min(N, MOST_EDGES)
    rows = edges + B * triton.cdiv(T, config.walks * config.length)
    vector = access(x, dy)
    parts = x.new_empty(rows, W + 1, D, dtype=torch.float32)
    causal_conv1d_bwd_kernel_dx[(rows * triton.cdiv(D, config.channels),)](
        x,
        dy,
        grads[1].contiguous(),
        *(None if t is None else t.contiguous() for t in (weight, bias, initial_state, cu_seqlens)),
        dx,
        dstate,
        parts,
        T,
        N,
        edges,
        config.length,
        x.stride(0) // vector,
        x.stride(1) // vector,
        dy.stride(0) // vector,
        dy.stride(1) // vector,
        D,
        W,
        config.channels,
        config.walks,
        config.ahead,
        config.stages,
        vector,
        activation == "silu",
        x.dtype == torch.float32,
        num_warps=config.num_warps,
    )
    causal_conv1d_bwd_kernel_dweight[(triton.cdiv((W + 1) * D, _REDUCED_COLUMNS),)](
        parts, dweight, dbias, rows, D, W, _REDUCED_ROWS, _REDUCED_COLUMNS, num_warps=4
    )
    return found
