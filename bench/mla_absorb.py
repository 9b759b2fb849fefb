"""Absorbed latent attention alone, and inside a whole decode step of a layer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, timing
from bench.contest import Contestant, Results, Roofs, Work
from bench.peers import mla_absorb as peers
from bench.peers.mla_absorb import Attention, AttentionForm, LatentCache, Step, StepInputs
from bench.shapes import MLA_ABSORB, MLA_ABSORB_FP8, MLA_ABSORB_LARGE, LatentCase
from bench.timing import Call, Rotation

CASES = {case.name: case for case in (*MLA_ABSORB, *MLA_ABSORB_FP8)}
EXTRA_CASES = {case.name: case for case in MLA_ABSORB_LARGE}
PEERS = list(peers.FORMS)
BACKENDS = ["cuda", "triton", "composed"]
NOT_OF = {"attention": ["composed"], "step": []}  # backends, by scope
PASSES = {"attention": "decode", "step": "layer"}
SECONDS = 0.6  # of the clocks, a row
# Further from float64 than this is another function: fused kernels leave 2e-3 to 3e-3, eager ones up to 1e-2.
MAX_ERROR = 5e-2
# Of copies of the cache, that calls take in turn. An H200's L2 has 50 MB, and may keep some of them until their turn.
COLD_BYTES = 2 << 30
MOST_COPIES = 256
HOST_TOKENS = 4096  # up to so many cached tokens a call's time on the host is of interest


def ceilings() -> dict[str, float]:
    """For the result file, beside the roofs that every stem has."""
    return {"read_bytes_per_second": timing.read_bandwidth()}


def draw_cache(case: LatentCase, generator: torch.Generator) -> LatentCache:
    """Copies of one cache, whose pages lie in random order; what lies behind a sequence's end is drawn, too.

    No peer attends to all rows of one in fp8: theirs are dequantized, in 16 bits.
    """
    device = generator.device
    counts = [-(-length // case.page) for length in case.lengths]
    order = torch.randperm(sum(counts), generator=generator, device=device).int()
    block_table = torch.zeros(case.B, max(counts), dtype=torch.int32, device=device)
    for pages, found in zip(block_table, order.split(counts), strict=True):
        pages[: len(found)] = found
    shape = sum(counts), case.page, case.R + case.E
    first, coded = normal_numbers(case, generator)(shape), None
    if case.fp8:
        coded = hylo_ops.quantize_kv_cache(first, latent_rank=case.R)
        first = dequantized(coded, case, case.dtype)
    return LatentCache(
        copies=cold_copies(first),
        fp8_copies=() if coded is None else cold_copies(coded),
        lengths=case.lengths,
        cache_seqlens=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        block_table=block_table,
        H=case.H,
        R=case.R,
        E=case.E,
        scale=(case.nope + case.E) ** -0.5,
    )


def dequantized(coded: Tensor, case: LatentCase, out_dtype: torch.dtype) -> Tensor:
    sizes: dict[str, Any] = {"latent_rank": case.R, "width": case.R + case.E, "dtype": case.dtype}
    return hylo_ops.dequantize_kv_cache(coded, **sizes, out_dtype=out_dtype)


def cold_copies(cache: Tensor) -> tuple[Tensor, ...]:
    return timing.cold_copies(cache, min(COLD_BYTES, MOST_COPIES * cache.nbytes))


def seeded(device: str = "cuda") -> torch.Generator:
    return torch.Generator(device=device).manual_seed(0)


def normal_numbers(case: LatentCase, generator: torch.Generator) -> Callable[..., Tensor]:
    """What draws a tensor of a shape."""
    return partial(torch.randn, generator=generator, dtype=case.dtype, device=generator.device)


def work(case: LatentCase) -> Work:
    """The counts of the agreed cost model ("MLA kernels on Hopper", section 2), without partial results.

    A multiply and an add are 2 FLOP. Of a cached token: 2 H (2 R + E) FLOP, R + E numbers read once for all heads. Of a
    sequence: H (2 R + E) numbers of queries and output. A step has instead those before and behind the up-projections,
    both of these once, 2 H R (nope + v) FLOP, cos and sin, and the new row read and written. Bytes are the true ones,
    also for those who read padding: a cached token in fp8 has R, 4 for each 128 latents, and E numbers.
    """
    size, tokens, row = case.dtype.itemsize, sum(case.lengths), case.R + case.E
    flop = 2 * tokens * case.H * (case.R + row)
    if case.scope == "attention":
        cached = case.R + 4 * -(-case.R // 128) + size * case.E if case.fp8 else size * row
        return Work(bytes=tokens * cached + size * case.B * case.H * (case.R + row), flop=flop)
    weights = case.HK * case.R * (case.nope + case.v)
    of_sequence = case.H * (case.nope + case.E + case.v) + 2 * row + 2 * case.E
    old_rows = (tokens - case.B) * row
    return Work(
        bytes=size * (old_rows + weights + case.B * of_sequence),
        flop=flop + 2 * case.B * case.H * case.R * (case.nope + case.v),
    )


def our_attention(backend: str, cache: LatentCache) -> Attention:
    lengths: dict[str, Any] = {"cache_seqlens": cache.cache_seqlens, "block_table": cache.block_table}

    def attend(queries: tuple[Tensor, Tensor], copy: Tensor) -> Tensor:
        o = hylo_ops.mla_absorb(*queries, copy, **lengths, scale=cache.scale, backend=backend)
        assert isinstance(o, Tensor)
        return o

    return Attention(cache.fp8_copies or cache.copies, cache.slots, lambda *queries: queries, attend)


def first_call(case: LatentCase, backend: str, device: str) -> Callable[[], Callable[[], object]]:
    """Draws inputs; what is returned attends, and returns what does nothing: decoding has no backward."""
    generator = seeded(device)
    cache, normal = draw_cache(case, generator), normal_numbers(case, generator)
    queries = normal(case.B, 1, case.H, case.R), normal(case.B, 1, case.H, case.E)

    def forward() -> Callable[[], object]:
        attention = our_attention(backend, cache)
        attention.attend(queries, attention.copies[0])
        return lambda: None

    return forward


def our_step(backend: str, inputs: StepInputs) -> Step:
    i, cache = inputs, inputs.cache
    options: dict[str, Any] = {"cache_seqlens": cache.cache_seqlens, "block_table": cache.block_table}
    options |= {"position": cache.position, "cos": i.cos, "sin": i.sin, "scale": cache.scale, "backend": backend}

    def call(copy: Tensor) -> Tensor:
        return hylo_ops.fused.mla_step(i.q_nope, i.q_rope, i.kv_new, i.w_uk, i.w_uv, copy, **options)

    return Step(cache.copies, cache.slots, call)


def eager_step(form: AttentionForm, inputs: StepInputs) -> Step:
    attention = form(inputs.cache)
    return Step(attention.copies, attention.slots, partial(peers.eager_step, attention, inputs))


@dataclass(frozen=True)
class Sides:
    """Who takes part in a scope, ours by backend and the peers by name, and what float64 gives."""

    ours: Callable[[str], Contestant]
    peers: Mapping[str, Contestant]
    exact: Results


def attention_sides(case: LatentCase) -> Sides:
    generator = seeded()
    cache, normal = draw_cache(case, generator), normal_numbers(case, generator)
    queries = normal(case.B, 1, case.H, case.R), normal(case.B, 1, case.H, case.E)

    def contestant(form: AttentionForm) -> Contestant:
        def check() -> Results:
            attention = form(cache)
            return {"o": attention.attend(attention.pack(*queries), attention.copies[0])}

        def start() -> Call:
            attention = form(cache)
            packed = attention.pack(*queries)
            return Rotation([partial(attention.attend, packed, copy) for copy in attention.copies])

        return Contestant(check=check, start=start)

    # queries in float64 make the reference compute so, slice by slice of the cache as it is: 2M tokens fit
    rows = dequantized(cache.fp8_copies[0], case, torch.float64) if case.fp8 else cache.copies[0]
    exact = our_attention("reference", cache).attend((queries[0].double(), queries[1].double()), rows)
    return Sides(
        ours=lambda name: contestant(partial(our_attention, name)),
        peers={name: contestant(form) for name, form in peers.FORMS.items()},
        exact={"o": exact},
    )


def draw_step(case: LatentCase) -> StepInputs:
    generator = seeded()
    cache, normal = draw_cache(case, generator), normal_numbers(case, generator)
    angle = normal(case.B, 1, case.E // 2).float().repeat(1, 1, 2) * torch.pi
    return StepInputs(
        cache=cache,
        q_nope=normal(case.B, 1, case.H, case.nope),
        q_rope=normal(case.B, 1, case.H, case.E),
        kv_new=normal(case.B, 1, case.R + case.E),
        w_uk=normal(case.HK, case.nope, case.R) * case.nope**-0.5,
        w_uv=normal(case.HK, case.v, case.R) * case.R**-0.5,
        cos=angle.cos().to(case.dtype),
        sin=angle.sin().to(case.dtype),
    )


def step_sides(case: LatentCase) -> Sides:
    inputs = draw_step(case)

    def contestant(begin: Callable[[], Step]) -> Contestant:
        def start() -> Call:
            step = begin()
            return Rotation([partial(step.call, copy) for copy in step.copies])

        return Contestant(check=lambda: step_results(begin(), case.R + case.E), start=start)

    doubles = inputs.double()
    return Sides(
        ours=lambda name: contestant(partial(our_step, name, inputs)),
        peers={name: contestant(partial(eager_step, form, inputs)) for name, form in peers.FORMS.items()},
        exact=step_results(our_step("reference", doubles), case.R + case.E),
    )


def step_results(step: Step, width: int) -> Results:
    """What a step gives, and the row it writes to its first copy, where NaN stood."""
    rows = step.copies[0].flatten(0, 1)[:, :width]
    rows[step.slots] = torch.nan
    return {"o": step.call(step.copies[0]), "row": rows[step.slots]}


SCOPES = {"attention": attention_sides, "step": step_sides}


def run(case: LatentCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """One row for each backend that the scope has; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    sides = SCOPES[case.scope](case)
    able = {name: sides.ours(name) for name in backends if name not in NOT_OF[case.scope]}
    chosen = {name: contestant for name, contestant in sides.peers.items() if name in chosen_peers}
    ours, others = contest.prepare(case.name, able, chosen, sides.exact, MAX_ERROR)
    common = {
        **contest.described(case, PASSES[case.scope]),
        **({"state_dtype": "fp8"} if case.fp8 else {}),
        "scope": case.scope,
        "tokens": sum(case.lengths),
        "page": case.page,
    }
    host = case.B == 1 and case.S <= HOST_TOKENS
    needed = work(case)
    for row in contest.rows(common, ours, others, needed, roofs, seconds=SECONDS, host=host):
        yield contest.with_all_rates(row, needed)
