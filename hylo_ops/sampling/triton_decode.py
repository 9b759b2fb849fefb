"""The next token of each sequence in Triton. A program goes through a row of logits a few times: docs/sampling.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import launch, next_power_of_2
from hylo_ops.common.triton_math import INTERPRETING

_LANES, _UNROLL, _WARPS = 8192, 4, 16
_MOST_HELD = 1 << 14  # numbers of a row, in registers
_LOG2_E = 1.4426950408889634
# Of the order in which numbers of a type are, bits that a wider one has behind.
_SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def load_logits(p_row, at, V):
    """In fp32, and -inf behind the end; a zero has no sign."""
    return tl.load(p_row + at, mask=at < V, other=-float("inf")).to(tl.float32) + 0.0


@triton.jit
def weigh(x, top, scale, low, share):
    """What each counts: exp2((x - top) scale) above `low`, `share` of it at it, nothing below."""
    counted = tl.where(x > low, 1.0, tl.where(x == low, share, 0.0))
    return counted * tl.exp2((x - top) * scale)


@triton.jit
def lane_tops(p_row, V, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """The greatest of each lane: numbers that are LANES apart."""
    lanes = tl.arange(0, LANES)
    tops = tl.full([LANES], -float("inf"), tl.float32)
    for begin in range(0, V, LANES * UNROLL):
        for i in tl.static_range(UNROLL):
            tops = tl.maximum(tops, load_logits(p_row, begin + i * LANES + lanes, V))
    return tops


@triton.jit
def first_at(p_row, V, value, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """The first place of a number that is there."""
    lanes = tl.arange(0, LANES)
    places = tl.full([LANES], 2147483647, tl.int32)
    for begin in range(0, V, LANES * UNROLL):
        for i in tl.static_range(UNROLL):
            at = begin + i * LANES + lanes
            places = tl.minimum(places, tl.where(load_logits(p_row, at, V) == value, at, 2147483647))
    return tl.min(places, axis=0)


@triton.jit
def pick(weights, target, SIZE: tl.constexpr):
    """The place at which the sums of weights pass `target`, and the sum of those before; one of some weight."""
    places = tl.arange(0, SIZE)
    sums = tl.cumsum(weights, axis=0)
    place = tl.min(tl.where((sums > target) & (weights > 0.0), places, SIZE), axis=0)
    place = tl.where(place < SIZE, place, tl.max(tl.where(weights > 0.0, places, 0), axis=0))
    return place, tl.sum(tl.where(places == place, sums - weights, 0.0), axis=0)


@triton.jit
def draw_of_row(
    p_row, V, top, scale, low, share, uniform, LANES: tl.constexpr, UNROLL: tl.constexpr, OF_LANE: tl.constexpr
):
    """A token by its weight, its logit, and the sum of all weights: a lane first, then one of the lane's."""
    lanes = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float32)
    for begin in range(0, V, LANES * UNROLL):
        for i in tl.static_range(UNROLL):
            sums += weigh(load_logits(p_row, begin + i * LANES + lanes, V), top, scale, low, share)
    total = tl.sum(sums, axis=0)
    target = uniform * total
    lane, before = pick(sums, target, LANES)
    at = lane + LANES * tl.arange(0, OF_LANE)
    x = load_logits(p_row, at, V)
    place, _ = pick(weigh(x, top, scale, low, share), target - before, OF_LANE)
    logit = tl.max(tl.where(tl.arange(0, OF_LANE) == place, x, -float("inf")), axis=0)
    return lane + LANES * place, logit, total


@triton.jit
def draw_of_held(
    x, lanes, top, scale, low, share, uniform, HELD: tl.constexpr, LANES: tl.constexpr, OF_LANE: tl.constexpr
):
    """The same where all that counts is in registers: x [HELD, OF_LANE] of some lanes [HELD]."""
    weights = weigh(x, top, scale, low, share)
    sums = tl.sum(weights, axis=1)
    total = tl.sum(sums, axis=0)
    target = uniform * total
    i, before = pick(sums, target, HELD)
    mine = tl.arange(0, HELD) == i
    place, _ = pick(tl.sum(tl.where(mine[:, None], weights, 0.0), axis=0), target - before, OF_LANE)
    it = mine[:, None] & (tl.arange(0, OF_LANE) == place)[None, :]
    logit = tl.max(tl.max(tl.where(it, x, -float("inf")), axis=1), axis=0)
    return tl.sum(tl.where(mine, lanes, 0), axis=0) + LANES * place, logit, total


@triton.jit
def above_in_row(p_row, V, top, scale, value, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """The weights of all that is greater, and how many are equal."""
    lanes = tl.arange(0, LANES)
    sums, equal = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.int32)
    for begin in range(0, V, LANES * UNROLL):
        for i in tl.static_range(UNROLL):
            x = load_logits(p_row, begin + i * LANES + lanes, V)
            sums += weigh(x, top, scale, value, 0.0)
            equal += (x == value).to(tl.int32)
    return tl.sum(sums, axis=0), tl.sum(equal, axis=0)


@triton.jit
def above_in_held(x, top, scale, value):
    return tl.sum(tl.sum(weigh(x, top, scale, value, 0.0), axis=1), axis=0), count(x == value)


@triton.jit
def count(these):
    """Of one dim or two."""
    return tl.sum(tl.ravel(these).to(tl.int32), axis=0)


@triton.jit
def choose(
    p_row,
    x,
    lanes,
    p_numbers,
    V,
    top,
    scale,
    low,
    share,
    top_p,
    DRAWS: tl.constexpr,
    CUT_P: tl.constexpr,
    HELD: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    OF_LANE: tl.constexpr,
):
    """A token, by up to DRAWS draws: of a row, or of what is held of it, unless HELD is 0."""
    token, logit, total = draw(
        p_row, x, lanes, V, top, scale, low, share, tl.load(p_numbers), HELD, LANES, UNROLL, OF_LANE
    )
    if CUT_P:
        # What is drawn from all counts if it is one of the likeliest; else what is no likelier is left out, and one is
        # drawn anew. At the edge a share of equals counts, since their order means nothing.
        wanted, taken, i = top_p * total, False, 1
        while not taken and i < DRAWS:
            if HELD:
                mass, equal = above_in_held(x, top, scale, logit)
            else:
                mass, equal = above_in_row(p_row, V, top, scale, logit, LANES, UNROLL)
            had = tl.where(logit == low, share, 1.0)
            left = tl.ceil((wanted - mass) / tl.exp2((logit - top) * scale))
            share = tl.where(mass < wanted, tl.minimum(left / equal.to(tl.float32), had), 0.0)
            low = logit
            taken = tl.load(p_numbers + 2 * i - 1) * had < share
            if not taken:
                token, logit, _ = draw(
                    p_row,
                    x,
                    lanes,
                    V,
                    top,
                    scale,
                    low,
                    share,
                    tl.load(p_numbers + 2 * i),
                    HELD,
                    LANES,
                    UNROLL,
                    OF_LANE,
                )
                taken = share > 0.0
            i += 1
        if not taken:
            token = first_at(p_row, V, top, LANES, UNROLL)
    return token


@triton.jit
def draw(
    p_row,
    x,
    lanes,
    V,
    top,
    scale,
    low,
    share,
    uniform,
    HELD: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    OF_LANE: tl.constexpr,
):
    if HELD:
        token, logit, total = draw_of_held(x, lanes, top, scale, low, share, uniform, HELD, LANES, OF_LANE)
    else:
        token, logit, total = draw_of_row(p_row, V, top, scale, low, share, uniform, LANES, UNROLL, OF_LANE)
    return token, logit, total


@triton.jit
def rank_of(x, SPARE: tl.constexpr):
    """Integers in the order of the numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SPARE


@triton.jit
def number_at(rank, SPARE: tl.constexpr):
    """The inverse, of ranks that numbers of the narrow type have."""
    order = (rank << SPARE) | tl.where(rank < 0, (1 << SPARE) - 1, 0)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def part_of(begin, end, parts):
    """What is between two ranks, which of fp32 needs 33 bits, in so many parts."""
    return ((end.to(tl.int64) - begin) // parts).to(tl.int32)


@triton.jit
def ranks_of_tops(tops, V, LANES: tl.constexpr, SPARE: tl.constexpr):
    """Ranks of lanes' greatest numbers, the least of them, and the first above all."""
    ranks = rank_of(tops, SPARE)
    end = tl.max(ranks, axis=0) + 1
    return ranks, tl.min(tl.where(tl.arange(0, LANES) < V, ranks, end), axis=0), end


@triton.jit
def greatest(ranks, k, begin, end):
    """The greatest rank below `end` that k of these are no less than, as k are no less than `begin`."""
    while begin + 1 < end:
        middle = begin + part_of(begin, end, 2)
        enough = count(ranks >= middle) >= k
        begin, end = tl.where(enough, middle, begin), tl.where(enough, end, middle)
    return begin


@triton.jit
def hold(p_row, p_held, chosen, V, HELD: tl.constexpr, LANES: tl.constexpr, OF_LANE: tl.constexpr):
    """All numbers [HELD, OF_LANE] of the lanes that are chosen, no more than HELD, and these [HELD]; -inf for none."""
    places = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(p_held + places, tl.arange(0, LANES), mask=chosen)
    tl.debug_barrier()
    i = tl.arange(0, HELD)
    lanes = tl.load(p_held + i, mask=i < count(chosen), other=V, cache_modifier=".cg")
    return load_logits(p_row, lanes[:, None] + LANES * tl.arange(0, OF_LANE)[None, :], V), lanes


@triton.jit
def likeliest(p_row, V, k, tops, LANES: tl.constexpr, UNROLL: tl.constexpr, SPARE: tl.constexpr):
    """(low, share): the k likeliest are those above `low` and that share of those at it.

    The interval of ranks that holds the k-th has three cuts at each pass. It begins with a number that each lane has
    something no less than.
    """
    lanes = tl.arange(0, LANES)
    _, begin, end = ranks_of_tops(tops, V, LANES, SPARE)
    if k > tl.minimum(V, LANES):
        begin = rank_of(tl.full([], -float("inf"), tl.float32), SPARE)
    at_begin, at_end = V, 0  # how many are no less than `begin`, and than `end`; the first once it is counted
    counted = False
    while (begin + 1 < end or not counted) and at_begin != k:
        step = tl.maximum(part_of(begin, end, 4), 1)
        first, second, third = begin + step, tl.minimum(begin + 2 * step, end), tl.minimum(begin + 3 * step, end)
        n0, n1 = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
        n2, n3 = tl.zeros([LANES], tl.int32), tl.zeros([LANES], tl.int32)
        for start in range(0, V, LANES * UNROLL):
            for i in tl.static_range(UNROLL):
                at = start + i * LANES + lanes
                rank = tl.where(at < V, rank_of(load_logits(p_row, at, V), SPARE), -2147483648)
                n0 += (rank >= begin).to(tl.int32)
                n1 += (rank >= first).to(tl.int32)
                n2 += (rank >= second).to(tl.int32)
                n3 += (rank >= third).to(tl.int32)
        at_begin = tl.sum(n0, axis=0)
        at_first, at_second, at_third = tl.sum(n1, axis=0), tl.sum(n2, axis=0), tl.sum(n3, axis=0)
        counted = True
        if at_third >= k:
            begin, at_begin = third, at_third
        elif at_second >= k:
            begin, at_begin, end, at_end = second, at_second, third, at_third
        elif at_first >= k:
            begin, at_begin, end, at_end = first, at_first, second, at_second
        else:
            end, at_end = first, at_first
    exactly = at_begin == k
    below = tl.where(begin == 0, -2, begin - 1)  # -1 is a zero with a sign
    low = number_at(tl.where(exactly, below, begin), SPARE)
    return low, tl.where(exactly, 0.0, (k - at_end) / tl.maximum(at_begin - at_end, 1).to(tl.float32))


@triton.jit
def sampling_kernel_token(
    p_logits,
    p_uniforms,
    p_held,
    p_tokens,
    stride,
    stride_uniforms,
    V,
    scale,
    top_k,
    top_p,
    DRAWS: tl.constexpr,
    CUT_K: tl.constexpr,
    CUT_P: tl.constexpr,
    SPARE: tl.constexpr,
    HELD: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    OF_LANE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + row * stride
    p_numbers = p_uniforms + row * stride_uniforms
    tops = lane_tops(p_row, V, LANES, UNROLL)
    top = tl.max(tops, axis=0)
    if DRAWS == 0:
        token = first_at(p_row, V, top, LANES, UNROLL)
    else:
        low, share = -float("inf"), 0.0
        token, is_chosen = 0, False
        if HELD:
            # Of lanes' greatest numbers the k-th is no greater than the k-th of all: what is no less stands in these
            # lanes. Where equals make them too many, what is greater stands in less than k of them.
            ranks, begin, end = ranks_of_tops(tops, V, LANES, SPARE)
            edge = greatest(ranks, top_k, begin, end)
            first = tl.where(count(ranks >= edge) <= HELD, edge, edge + 1)
            x, lanes = hold(p_row, p_held + row * HELD, ranks >= first, V, HELD, LANES, OF_LANE)
            held = rank_of(x, SPARE)
            greater = count(held >= first)
            is_chosen = greater >= top_k
            if is_chosen:
                edge = greatest(held, top_k, first, end)
                greater = count(held > edge)
                low, share = number_at(edge, SPARE), (top_k - greater) / count(held == edge).to(tl.float32)
                token = choose(
                    p_row,
                    x,
                    lanes,
                    p_numbers,
                    V,
                    top,
                    scale,
                    low,
                    share,
                    top_p,
                    DRAWS,
                    CUT_P,
                    HELD,
                    LANES,
                    UNROLL,
                    OF_LANE,
                )
            else:
                low = number_at(edge, SPARE)
                _, equal = above_in_row(p_row, V, top, scale, low, LANES, UNROLL)
                share = (top_k - greater) / equal.to(tl.float32)
        elif CUT_K:
            low, share = likeliest(p_row, V, top_k, tops, LANES, UNROLL, SPARE)
        if not is_chosen:
            token = choose(
                p_row, 0, 0, p_numbers, V, top, scale, low, share, top_p, DRAWS, CUT_P, 0, LANES, UNROLL, OF_LANE
            )
    tl.store(p_tokens + row, token.to(tl.int64))


def forward(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """tokens [B] int64 of logits [B, V]; uniforms [B, 2 n - 1] has a number for the first draw, and two for each
    further one: whether the one before counts, and its own."""
    B, V = logits.shape
    tokens = logits.new_empty(B, dtype=torch.int64)
    k, p = V if top_k is None else top_k, 1.0 if top_p is None else top_p
    lanes = min(_LANES, next_power_of_2(V))
    of_lane = next_power_of_2(-(-V // lanes))
    held = 0 if temperature == 0 else _lanes_held(min(k, V), V, lanes, of_lane)
    launch(
        sampling_kernel_token,
        (B, 1, 1),
        (logits, uniforms, logits.new_empty(B, held, dtype=torch.int32) if held else None, tokens),
        (
            logits.stride(0),
            uniforms.stride(0),
            V,
            _LOG2_E / temperature if temperature > 0 else 1.0,
            min(k, V),
            float(p),
        ),
        (
            (uniforms.shape[1] + 1) // 2 if temperature > 0 else 0,
            k < V,
            p < 1,
            _SPARE_BITS[logits.dtype],
            held,
            lanes,
            1 if INTERPRETING else _UNROLL,
            of_lane,
        ),
        _WARPS,
    )
    return tokens


def _lanes_held(k: int, V: int, lanes: int, of_lane: int) -> int:
    """How many lanes a program has room for, twice as many as there are likeliest numbers: some of these are equal.
    0 if there is no room, or if all are left."""
    held = next_power_of_2(2 * k)
    return held if k < V and held <= lanes and held * of_lane <= _MOST_HELD else 0
