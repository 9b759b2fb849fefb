"""Forward of the short causal convolution in Triton, and what its kernels share with the backward's.

Tiles of tokens are walked along T with the window in registers. What sees the states, the first W - 1 tokens of a
sequence and its last W inputs, belongs to "edge" programs of the same launch: docs/causal_conv1d.md.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2_HIGH = tl.constexpr(0.693359375)  # nine bits: a product with a small integer is exact
_LN_2_LOW = tl.constexpr(-2.12194440e-4)
_ACCESS_BYTES = 16
_PROGRAMS = 528  # four on each of an H100's or H200's 132 multiprocessors
MOST_EDGES = 128  # programs; more sequences share them


class Config(NamedTuple):
    """How tokens and channels are cut into programs, and how a program reads them.

    Args:
        channels: of a program.
        elements: of a row that a thread holds; with those of one access or fewer, a load is one access.
        length: tokens that a thread walks along, at most.
        ahead: of them that it asks for at once; the length is a multiple.
        stages: of such requests in flight through shared memory; 1: none, they go to registers.
        num_warps: of a program.
    """

    channels: int
    elements: int
    length: int
    ahead: int
    stages: int
    num_warps: int

    @property
    def walks(self) -> int:
        """Side by side in a program."""
        return 32 * self.num_warps * self.elements // self.channels

    def fitted(self, B: int, T: int, D: int) -> "Config":
        """For these dims: no more channels than there are, and walks short enough to make `_PROGRAMS` programs."""
        channels = min(self.channels, triton.next_power_of_2(D))
        fitted = self._replace(channels=channels)
        wanted = B * T * triton.cdiv(D, channels) // (fitted.walks * _PROGRAMS)
        return fitted._replace(length=min(max(wanted // self.ahead, 1) * self.ahead, self.length))


@triton.jit
def sigmoid(b_z, PRECISE: tl.constexpr):
    if PRECISE:
        # exp(-z) = 2^n exp(r): a rounded exponent to base 2 would cost |z| units of the last place.
        b_z = tl.clamp(b_z, -100.0, 100.0)  # 2^n is inf or as good as 0
        b_n = tl.floor(b_z * -_LOG2_E + 0.5)
        b_r = (-b_z - b_n * _LN_2_HIGH) - b_n * _LN_2_LOW
        b_sigmoid = tl.math.div_rn(1.0, 1.0 + tl.exp2(b_n) * tl.exp2(b_r * _LOG2_E))
    else:
        # A reciprocal in one instruction, where a division takes several; 0 where the exponential is inf.
        b_root = tl.rsqrt(1.0 + tl.exp2(b_z * -_LOG2_E))
        b_sigmoid = b_root * b_root
    return b_sigmoid


@triton.jit
def load_channels(p_x, o_x, m_x):
    """Values of a vector in float32; zeros where masked, and for a vector that is None."""
    if p_x is None:
        b_x = tl.zeros(o_x.shape, dtype=tl.float32)
    else:
        b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x


@triton.jit
def load_columns(p_x, o_d, m_d, W: tl.constexpr, BD: tl.constexpr):
    """The W columns [BD] of a contiguous [D, W]; zeros where masked."""
    if W == 3:
        b_columns = ()
        for w in tl.static_range(W):
            b_columns += (tl.load(p_x + o_d * W + w, mask=m_d, other=0.0),)
    else:
        # Whole rows in one access: column by column a warp asks for 16 lines of the cache with each of 32 loads.
        p_rows = p_x + o_d[:, None] * W + tl.arange(0, W)[None, :]
        b_rows = tl.load(p_rows, mask=m_d[:, None], other=0.0)
        if W == 2:
            b_columns = tl.split(b_rows)
        else:
            b_even, b_odd = tl.split(tl.reshape(b_rows, [BD, 2, 2]))
            b_first, b_third = tl.split(b_even)
            b_second, b_fourth = tl.split(b_odd)
            b_columns = (b_first, b_second, b_third, b_fourth)
    return b_columns


@triton.jit
def in_float32(b_narrow, COUNT: tl.constexpr):
    b_wide = ()
    for i in tl.static_range(COUNT):
        b_wide += (b_narrow[i].to(tl.float32),)
    return b_wide


@triton.jit
def convolve(b_weight, b_bias, b_window, W: tl.constexpr):
    """bias + sum of the weights times the last W inputs, oldest first: one order everywhere, so the same bits."""
    b_z = b_bias
    for w in tl.static_range(W):
        b_z = tl.fma(b_weight[w], b_window[w], b_z)
    return b_z


@triton.jit
def activate(b_z, SILU: tl.constexpr, PRECISE: tl.constexpr):
    return b_z * sigmoid(b_z, PRECISE) if SILU else b_z


@triton.jit
def sequence_of(o_t, p_bounds, first, last):
    """Which of the sequences first..last holds a token; of equal bounds (empty sequences) the last one."""
    b_low = o_t * 0 + first
    b_high = o_t * 0 + last
    span = last - first
    while span > 0:
        b_middle = (b_low + b_high + 1) // 2
        m_behind = tl.load(p_bounds + b_middle).to(tl.int32) <= o_t
        b_low = tl.where(m_behind, b_middle, b_low)
        b_high = tl.where(m_behind, b_high, b_middle - 1)
        span = span // 2
    return b_low


@triton.jit
def bounds_of(o_t, p_bounds, first, last, T):
    """Begin and end of a token's sequence, which is one of first..last."""
    if p_bounds is None:
        begin = o_t * 0
        end = begin + T
    else:
        o_n = sequence_of(o_t, p_bounds, first, last)
        begin = tl.load(p_bounds + o_n).to(tl.int32)
        end = tl.load(p_bounds + o_n + 1).to(tl.int32)
    return begin, end


@triton.jit
def sequences_of(begin_tile, tokens, p_bounds, N, T):
    """Begin and end of the sequence that holds a tile's first token; it, and the one that holds the last of so many."""
    if p_bounds is None:
        begin = 0
        end = T
        first = 0
        last = 0
    else:
        first = sequence_of(begin_tile, p_bounds, 0, N - 1)
        begin = tl.load(p_bounds + first).to(tl.int32)
        end = tl.load(p_bounds + first + 1).to(tl.int32)
        last = first
        if end < begin_tile + tokens:
            last = sequence_of(tl.minimum(begin_tile + tokens, T) - 1, p_bounds, first, N - 1)
    return begin, end, first, last


@triton.jit
def as_rows(b_columns, W: tl.constexpr):
    """[1, BD] of each [BD]."""
    b_rows = ()
    for w in tl.static_range(W):
        b_rows += (b_columns[w][None, :],)
    return b_rows


@triton.jit
def tile_of(i_tile, T, L, R: tl.constexpr):
    """Row of the batch, first token of a tile of R walks of L tokens, and that of each walk [R]."""
    tiles = tl.cdiv(T, R * L)
    begin = i_tile % tiles * (R * L)
    return i_tile // tiles, begin, begin + tl.arange(0, R) * L


@triton.jit
def place_of(i_sequence, p_bounds, T):
    """Row of the batch that a sequence is in, its begin and its end."""
    if p_bounds is None:
        row = i_sequence
        begin = 0
        end = T
    else:
        row = 0
        begin = tl.load(p_bounds + i_sequence).to(tl.int32)
        end = tl.load(p_bounds + i_sequence + 1).to(tl.int32)
    return row, begin, end


@triton.jit
def load_inputs(p_x, stride, o_d, m_d, first, length, COUNT: tl.constexpr):
    """COUNT rows [BD] of a sequence, whose first one p_x points at, from row `first` on; zeros where it has none."""
    b_rows = ()
    for i in tl.static_range(COUNT):
        m_x = m_d & (first + i >= 0) & (first + i < length)
        b_rows += (tl.load(p_x + (first + i) * stride + o_d, mask=m_x, other=0.0),)
    return b_rows


@triton.jit
def load_column(p_state, column, o_d, m_d, W: tl.constexpr):
    """[BD] of a state [D, W]; zeros where it has no such column."""
    return tl.load(p_state + o_d * W + column, mask=m_d & (column >= 0) & (column < W), other=0.0)


@triton.jit
def load_first_inputs(p_x, stride, p_state, o_d, m_d, length, COUNT: tl.constexpr, W: tl.constexpr):
    """The W - 1 inputs before a sequence and its first COUNT, in float32."""
    b_inputs = ()
    for w in tl.static_range(1, W):
        if p_state is None:
            b_inputs += (tl.zeros(o_d.shape, dtype=tl.float32),)
        else:
            b_x = load_column(p_state, w, o_d, m_d, W).to(p_x.dtype.element_ty)
            b_inputs += (b_x.to(tl.float32),)
    return b_inputs + in_float32(load_inputs(p_x, stride, o_d, m_d, 0, length, COUNT), COUNT)


@triton.jit
def _edge(
    p_x,
    x_stride,
    b_weight,
    b_bias,
    p_state,
    p_y,
    p_final,
    length,
    o_d,
    m_d,
    D: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Of one sequence: the outputs of its first W - 1 tokens, and its last W inputs."""
    b_inputs = load_first_inputs(p_x, x_stride, p_state, o_d, m_d, length, W - 1, W)
    for t in tl.static_range(W - 1):
        b_y = activate(convolve(b_weight, b_bias, b_inputs[t : t + W], W), SILU, PRECISE)
        tl.store(p_y + t * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d & (t < length))
    b_last = load_inputs(p_x, x_stride, o_d, m_d, length - W, length, W)
    for w in tl.static_range(W):
        b_x = b_last[w]
        if p_state is not None:
            b_before = load_column(p_state, length + w, o_d, m_d, W)
            b_x = tl.where(length + w < W, b_before.to(b_x.dtype), b_x)
        tl.store(p_final + o_d * W + w, b_x, mask=m_d)


@triton.jit
def _walk(
    p_x,
    x_stride,
    b_weight,
    b_bias,
    p_y,
    p_bounds,
    o_t,
    m_d,
    first,
    last,
    T,
    L,
    D: tl.constexpr,
    W: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    INNER: tl.constexpr,
):
    """Outputs of L tokens from o_t [R] on, which p_x and p_y [R, BD] point at.

    INNER: all have the whole window in their sequence. Otherwise those of the sequences first..last that have it count.
    """
    b_window = ()
    for w in tl.static_range(W - 1):
        o_x = o_t + (w - W + 1)
        m_x = m_d if INNER else m_d & ((o_x >= 0) & (o_x < T))[:, None]
        b_window += (tl.load(p_x + (w - W + 1) * x_stride, mask=m_x, other=0.0).to(tl.float32),)
    for i in tl.range(0, L, U, num_stages=STAGES if INNER else 1):
        b_rows = ()
        for u in tl.static_range(U):
            m_x = m_d if INNER else m_d & (o_t + (i + u) < T)[:, None]
            b_rows += (tl.load(p_x + u * x_stride, mask=m_x, other=0.0),)
        for u in tl.static_range(U):
            b_window += (b_rows[u].to(tl.float32),)
            b_y = activate(convolve(b_weight, b_bias, b_window, W), SILU, PRECISE)
            b_window = b_window[1:]
            if INNER:
                m_y = m_d
            else:
                o_y = o_t + (i + u)
                begin, _ = bounds_of(o_y, p_bounds, first, last, T)
                m_y = m_d & ((o_y < T) & (o_y - begin >= W - 1))[:, None]
            tl.store(p_y + u * D, b_y.to(p_y.dtype.element_ty), mask=m_y)
        p_x += U * x_stride
        p_y += U * D


@triton.jit(do_not_specialize=["T", "N", "edges", "L", "x_stride_b", "x_stride_t"])
def causal_conv1d_fwd_kernel_y(
    p_x,
    p_weight,
    p_bias,
    p_state,
    p_bounds,
    p_y,
    p_final,
    T,
    N,
    edges,
    L,
    x_stride_b,
    x_stride_t,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    STAGES: tl.constexpr,
    VEC: tl.constexpr,
    SILU: tl.constexpr,
    PRECISE: tl.constexpr,
    STARTS_NEXT: tl.constexpr,
):
    """For BD channels each, first the edges' programs, then one per R walks of L tokens. Strides count VEC elements.

    STARTS_NEXT: lets a kernel that is launched to begin early do so; what it reads of this one it waits for.
    """
    if STARTS_NEXT:
        gdc_launch_dependents()
    ND: tl.constexpr = (D + BD - 1) // BD
    i_d = tl.program_id(0) % ND
    i_row = tl.program_id(0) // ND
    x_stride_b = x_stride_b.to(tl.int64) * VEC
    x_stride_t = x_stride_t.to(tl.int64) * VEC
    y_stride_t = tl.full([], D, tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D if D % BD else tl.full([BD], True, tl.int1)
    b_weight = in_float32(load_columns(p_weight, o_d, m_d, W, BD), W)
    b_bias = load_channels(p_bias, o_d, m_d)
    if i_row < edges:
        for n in range(i_row, N, edges):
            row, begin, end = place_of(n, p_bounds, T)
            o_state = y_stride_t * W * n
            _edge(
                p_x + (x_stride_b * row + x_stride_t * begin),
                x_stride_t,
                b_weight,
                b_bias,
                p_state + o_state if p_state is not None else None,
                p_y + (y_stride_t * T * row + y_stride_t * begin),
                p_final + o_state,
                end - begin,
                o_d,
                m_d,
                D,
                W,
                SILU,
                PRECISE,
            )
        return
    row, begin_tile, o_t = tile_of(i_row - edges, T, L, R)
    begin, end, first, last = sequences_of(begin_tile, R * L, p_bounds, N, T)
    p_x += x_stride_b * row + o_t[:, None] * x_stride_t + o_d[None, :]
    p_y += y_stride_t * T * row + o_t[:, None] * y_stride_t + o_d[None, :]
    b_weight = as_rows(b_weight, W)
    b_bias = b_bias[None, :]
    tile = (p_x, x_stride_t, b_weight, b_bias, p_y, p_bounds, o_t, m_d[None, :], first, last, T, L)
    if (begin_tile - begin >= W - 1) & (begin_tile + R * L <= end):
        _walk(*tile, D, W, U, STAGES, SILU, PRECISE, True)
    else:
        _walk(*tile, D, W, U, STAGES, SILU, PRECISE, False)


# The fastest of eleven on an H100 at 8192 tokens x 2304 channels, bf16: 29.1 us, a copy takes 27.1.
CONFIG = Config(channels=128, elements=4, length=8, ahead=8, stages=1, num_warps=4)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's forward; x may be strided along B and T."""
    x = x if x.stride(2) == 1 else x.contiguous()
    (B, T, D), W = x.shape, weight.shape[1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(N, D, W)
    if not final_state.numel():
        return y, final_state
    config = (config or CONFIG).fitted(B, T, D)
    edges = min(N, MOST_EDGES)
    programs = edges + B * triton.cdiv(T, config.walks * config.length)
    vector = access(x)
    causal_conv1d_fwd_kernel_y[(programs * triton.cdiv(D, config.channels),)](
        x,
        *(None if t is None else t.contiguous() for t in (weight, bias, initial_state, cu_seqlens)),
        y,
        final_state,
        T,
        N,
        edges,
        config.length,
        x.stride(0) // vector,
        x.stride(1) // vector,
        D,
        W,
        config.channels,
        config.walks,
        config.ahead,
        config.stages,
        vector,
        activation == "silu",
        x.dtype == torch.float32,
        starts_next(x.device),
        num_warps=config.num_warps,
    )
    return y, final_state


@functools.cache
def starts_next(device: torch.device) -> bool:
    """Whether kernels can begin before the one ahead has ended: the scan that comes after does."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def access(*tensors: Tensor) -> int:
    """Elements of one access: as many as 16 bytes hold and every row's start is a multiple of."""
    steps = _ACCESS_BYTES // tensors[0].element_size()
    for tensor in tensors:
        for dim in (0, 1):
            steps |= tensor.stride(dim) if tensor.shape[dim] > 1 else 0
    return steps & -steps
