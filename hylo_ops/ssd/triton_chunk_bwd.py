"""Triton backward of the chunked SSD scan. The algebra is in docs/ssd.md.

The kernels are the forward's: states of all chunks once more, the same walk from the last chunk back, and what tokens
collect, three times. Only the sums that are left are here. No atomics: the order of every sum is fixed.

The gradient of a log decay is the sum over all pairs of a token before it and one at or after it, in which nothing
cancels: not a difference of what tokens give and what they get.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_math import chunk_at
from hylo_ops.ssd.triton_chunk_fwd import Scan, Tiles, evenly_spaced, load_with_bias, state_before_chunks, step_size


@triton.jit
def ssd_bwd_kernel_gates(
    p_dt,
    p_dt_bias,
    p_a,
    p_ds,
    p_dg,
    p_dd,
    p_crossing_x,
    p_crossing_c,
    p_flow,
    p_ddt,
    p_sums,
    p_sequence,
    p_begin,
    p_end,
    least,
    most,
    dt_stride_t,
    dt_stride_h,
    slots,
    tokens,
    T,
    H: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    PARTS_X: tl.constexpr,
    PARTS_C: tl.constexpr,
    PARTS_FLOW: tl.constexpr,
    BLOCK_FLOW: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """ddt from the gradients of steps and log decays, and a chunk's part of da, ddt_bias and dd [3, H, slots].

    One program per chunk and head.
    """
    NB: tl.constexpr = Q // C
    i_h = tl.program_id(0) % H
    i_slot = tl.program_id(0) // H
    i_sequence, begin, end = chunk_at(i_slot, p_sequence, p_begin, p_end, T, Q)
    p_sums += i_h * slots + i_slot
    if i_sequence < 0:
        for i in tl.static_range(3):
            tl.store(p_sums + i * H * slots, 0.0)
        return
    size = tl.minimum(end - begin, Q).to(tl.int32)
    o_q = tl.arange(0, Q)
    m_q = o_q < size
    o_block = o_q // C
    o_slot = i_slot.to(tl.int64)

    o_flow = tl.arange(0, BLOCK_FLOW)
    p_flow += (o_slot * H + i_h) * PARTS_FLOW
    through = tl.sum(tl.load(p_flow + o_flow, mask=o_flow < PARTS_FLOW, other=0.0), 0)
    b_dg = tl.zeros([Q], dtype=tl.float32) + through
    b_ds = tl.zeros([Q], dtype=tl.float32)
    dd = 0.0
    for i in tl.static_range(PARTS_X):
        o_x = ((o_slot + i * slots) * H + i_h) * NB
        b_ds += tl.load(p_ds + (i_h.to(tl.int64) + i * H) * tokens + begin + o_q, mask=m_q, other=0.0)
        for i_block in tl.static_range(NB):
            p_later = p_crossing_x + (o_x + i_block) * NB + o_block
            b_dg += tl.load(p_later, mask=m_q & (o_block > i_block), other=0.0)
            if p_dd is not None:
                dd += tl.load(p_dd + o_x + i_block, mask=i_block * C < size, other=0.0)
    for i in tl.static_range(PARTS_C):
        o_c = ((o_slot + i * slots) * H + i_h) * NB
        for i_block in tl.static_range(NB):
            p_earlier = p_crossing_c + (o_c + i_block) * NB + o_block
            b_dg += tl.load(p_earlier, mask=(i_block * C < size) & (o_block < i_block), other=0.0)
    for i in tl.static_range(PARTS_X + PARTS_C):
        b_dg += tl.load(p_dg + (i_h.to(tl.int64) + i * H) * tokens + begin + o_q, mask=m_q, other=0.0)

    p_dt += begin * dt_stride_t + i_h * dt_stride_h
    b_dt = load_with_bias(p_dt, o_q * dt_stride_t, m_q, p_dt_bias, i_h)
    b_step = step_size(b_dt, least, most, SOFTPLUS, False)
    b_within = m_q
    if LIMITED:
        b_within = b_within & (b_step >= least) & (b_step <= most)
        b_step = step_size(b_step, least, most, False, True)
    da = tl.sum(tl.where(m_q, b_step * b_dg, 0.0), 0)
    b_ds += tl.load(p_a + i_h).to(tl.float32) * b_dg
    if SOFTPLUS:
        b_ds *= tl.sigmoid(b_dt)
    b_ds = tl.where(b_within, b_ds, 0.0)
    p_ddt += (begin + o_q) * H + i_h
    tl.store(p_ddt, b_ds.to(p_ddt.dtype.element_ty), mask=m_q)
    tl.store(p_sums, da)
    tl.store(p_sums + slots * H, tl.sum(b_ds, 0))
    tl.store(p_sums + 2 * slots * H, dd)


@triton.jit
def ssd_bwd_kernel_vectors(p_sums, p_da, p_ddt_bias, p_dd, slots, H: tl.constexpr, BLOCK: tl.constexpr):
    """da, ddt_bias and dd [H] from the chunks' parts. One program per vector and head."""
    i_h = tl.program_id(0)
    i_vector = tl.program_id(1)
    p_sums += (i_vector * H + i_h) * slots
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, slots, BLOCK):
        o_slot = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_sums + o_slot, mask=o_slot < slots, other=0.0)
    total = tl.sum(b_sum, 0)
    if i_vector == 0:
        tl.store(p_da + i_h, total.to(p_da.dtype.element_ty))
    elif i_vector == 1:
        if p_ddt_bias is not None:
            tl.store(p_ddt_bias + i_h, total.to(p_ddt_bias.dtype.element_ty))
    else:
        if p_dd is not None:
            tl.store(p_dd + i_h, total.to(p_dd.dtype.element_ty))


@triton.jit
def ssd_bwd_kernel_parts(p_parts, p_sum, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum [size] of the parts [PARTS, size]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.static_range(PARTS):
        b_sum += tl.load(p_parts + i * size + o, mask=m, other=0.0)
    tl.store(p_sum + o, b_sum.to(p_sum.dtype.element_ty), mask=m)


# Heads that share a gradient are summed within a program up to this many, then in parts: a matter of the dims only,
# so that the order of the sums is.
_MOST_HEADS = 8
_BLOCK = 1024


def backward(grads: list[Tensor], *inputs: Any, tiles: Tiles | None = None) -> list[Tensor]:
    """Gradients of the differentiable inputs that are given, in their order and dtypes.

    Recomputes the states before the chunks.

    Args:
        grads: gradients of o and of final_state.
        inputs: as the op has them.
    """
    scan = Scan(inputs[:-1], tiles)
    do, d_final_state = evenly_spaced(grads[0]), grads[1].contiguous()
    d_initial_state = None if scan.initial_state is None else torch.empty_like(scan.initial_state)

    added = scan.new_states()
    before = state_before_chunks(scan, added, None)
    scan.states(do, scan.c, added, weigh_writes=False)
    after = torch.empty_like(before)
    flow = scan.carry(added, d_final_state, after, d_initial_state, read=before)
    del added

    gates = _GateParts(scan, flow)
    dx = _summed(scan, "dx", after, do, scan.x, gates.of_x)
    db = _summed(scan, "db", after, do, scan.b)
    dc = _summed(scan, "dc", before, do, scan.c, gates.of_c)
    ddt, da, dd, ddt_bias = gates.gradients(inputs[1], inputs[2], inputs[5], inputs[6])
    found = (dx, ddt, da, db, dc, dd, ddt_bias, d_initial_state)
    return [gradient for gradient in found if gradient is not None]


def _summed(
    scan: Scan, name: str, states: Tensor, do: Tensor, like: Tensor, gates: tuple[Tensor | None, ...] = ()
) -> Tensor:
    """dx, db or dc, summed over the heads that share it."""
    B, T, heads, width = like.shape
    shared = scan.H // heads
    most = max(n for n in range(1, _MOST_HEADS + 1) if shared % n == 0)
    gradient = like.new_empty(B, T, heads, width)
    if most == shared:
        scan.collect(name, states, gradient.view(1, B * T, heads, width), do, gates)
        return gradient
    parts = like.new_empty(shared // most, B * T, heads, width, dtype=torch.float32)
    scan.collect(name, states, parts, do, gates)
    size = gradient.numel()
    ssd_bwd_kernel_parts[(triton.cdiv(size, _BLOCK),)](parts, gradient, size, shared // most, _BLOCK)
    return gradient


class _GateParts:
    """Gradients of steps, log decays and the skip in parts, as the kernels leave them, and the last sums over them."""

    def __init__(self, scan: Scan, flow: Tensor | None) -> None:
        self.scan, self.flow = scan, flow
        tiles = scan.tiles
        self.parts_x = triton.cdiv(scan.V, tiles.dx.fitted(scan.K, scan.V).columns)
        self.parts_c = triton.cdiv(scan.K, tiles.dc.fitted(scan.V, scan.K).columns)
        blocks, chunks = tiles.chunk // tiles.block, (scan.table.slots, scan.H)
        self.ds = scan.step.new_empty(self.parts_x, scan.H, scan.tokens)
        self.dg = scan.step.new_empty(self.parts_x + self.parts_c, scan.H, scan.tokens)
        self.dd = None if scan.d is None else scan.step.new_empty(self.parts_x, *chunks, blocks)
        # [from, to]: over which other blocks of the chunk
        self.crossing = scan.step.new_empty(self.parts_x + self.parts_c, *chunks, blocks, blocks)

    @property
    def of_x(self) -> tuple[Tensor | None, ...]:
        return self.ds, self.dg, self.dd, self.crossing

    @property
    def of_c(self) -> tuple[Tensor | None, ...]:
        return None, self.dg[self.parts_x :], None, self.crossing[self.parts_x :]

    def gradients(
        self, dt: Tensor, a: Tensor, d: Tensor | None, dt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """ddt, da, dd and ddt_bias, in the dtypes of the tensors given."""
        scan, slots = self.scan, self.scan.table.slots
        assert self.flow is not None
        ddt = dt.new_empty(dt.shape)
        da, dd, ddt_bias = (None if t is None else t.new_empty(t.shape) for t in (a, d, dt_bias))
        sums = self.ds.new_empty(3, scan.H, slots)
        ssd_bwd_kernel_gates[(slots * scan.H,)](
            scan.dt,
            scan.dt_bias,
            scan.a,
            self.ds,
            self.dg,
            self.dd,
            self.crossing,
            self.crossing[self.parts_x :],
            self.flow,
            ddt,
            sums,
            *scan.chunks,
            scan.least,
            scan.most,
            *scan.dt.stride()[1:],
            slots,
            scan.tokens,
            scan.T,
            scan.H,
            scan.tiles.chunk,
            scan.tiles.block,
            self.parts_x,
            self.parts_c,
            self.flow.shape[2],
            triton.next_power_of_2(self.flow.shape[2]),
            scan.softplus,
            scan.limited,
            num_warps=1,
        )
        ssd_bwd_kernel_vectors[(scan.H, 3)](sums, da, ddt_bias, dd, slots, scan.H, 256, num_warps=1)
        assert da is not None
        return ddt, da, dd, ddt_bias
