"""A chunk of new tokens over a long latent cache, beside the block that it is made of: T queries, T keys, no mask.

Ours and a block are different amounts of work, so they are compared by FLOP a second, counted by one formula.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, mla_absorb
from bench.contest import Contestant, Results, Roofs, Work
from bench.peers import mla_prefill as peers
from bench.peers.mla_absorb import LatentCache
from bench.peers.mla_prefill import Block, BlockForm
from bench.shapes import MLA_PREFILL, MLA_PREFILL_SLICES, PrefillCase

CASES = {case.name: case for case in MLA_PREFILL}
EXTRA_CASES = {case.name: case for case in MLA_PREFILL_SLICES}
PEERS = list(peers.FORMS)
BACKENDS = ["sliced"]
SECONDS = 0.6  # of the clocks, a row; a call of a second still has a few rounds
MAX_ERROR = 5e-2  # further from float64 than this is another function
CHECKED_QUERIES = 16  # in a row, at the chunk's begin, middle and end


@dataclass(frozen=True, kw_only=True)
class PrefillInputs:
    """q_nope [1, T, H, nope], q_rope [1, T, H, E], w_uk [HK, nope, R], w_uv [HK, v, R]; the cache has T more tokens."""

    q_nope: Tensor
    q_rope: Tensor
    cache: LatentCache
    w_uk: Tensor
    w_uv: Tensor


def draw(case: PrefillCase, generator: torch.Generator) -> PrefillInputs:
    normal = mla_absorb.normal_numbers(case, generator)
    return PrefillInputs(
        q_nope=normal(case.B, case.T, case.H, case.nope),
        q_rope=normal(case.B, case.T, case.H, case.E),
        cache=mla_absorb.draw_cache(case, generator),
        w_uk=normal(case.HK, case.nope, case.R) * case.R**-0.5,
        w_uv=normal(case.HK, case.v, case.R) * case.R**-0.5,
    )


def draw_block(case: PrefillCase, generator: torch.Generator) -> Block:
    normal, width = mla_absorb.normal_numbers(case, generator), case.nope + case.E
    q = normal(case.B, case.T, case.H, width)
    k, v = (normal(case.B, case.T, case.HK, w) for w in (width, case.v))
    return Block(q, k, v, scale=width**-0.5)


def flop(case: PrefillCase, pairs: int) -> int:
    """Of one head's products with so many pairs of a query and a key that it sees, for all heads; no expansion."""
    return 2 * case.H * pairs * (case.nope + case.E + case.v)


def work(case: PrefillCase) -> Work:
    """Bytes: the cache, the queries, the output and the weights once. FLOP: of the pairs that are seen, exactly."""
    past = case.S - case.T
    numbers = case.S * (case.R + case.E) + case.T * case.H * (case.nope + case.E + case.v)
    weights = case.HK * case.R * (case.nope + case.v)
    pairs = case.B * (case.T * past + case.T * (case.T + 1) // 2)
    return Work(bytes=case.dtype.itemsize * (case.B * numbers + weights), flop=flop(case, pairs))


def block_work(case: PrefillCase) -> Work:
    numbers = case.B * case.T * (case.H + case.HK) * (case.nope + case.E + case.v)
    return Work(bytes=case.dtype.itemsize * numbers, flop=flop(case, case.B * case.T**2))


def checked_queries(case: PrefillCase) -> list[slice]:
    """Of the chunk; the middle of the bar's chunk is also where two slices meet."""
    last = case.T - CHECKED_QUERIES
    return [slice(begin, begin + CHECKED_QUERIES) for begin in (0, last // 2, last)]


def prefill(
    x: PrefillInputs, backend: str, slice_tokens: int, queries: slice = slice(None), dtype: torch.dtype | None = None
) -> Tensor:
    """o [1, queries, H, v] of some of the chunk's queries."""
    tokens = x.q_nope.shape[1]
    last = tokens if queries.stop is None else queries.stop
    o = hylo_ops.mla_prefill(
        *(q[:, queries].to(dtype or q.dtype) for q in (x.q_nope, x.q_rope)),
        x.cache.copies[0],
        x.w_uk,
        x.w_uv,
        lengths=[length - tokens + last for length in x.cache.lengths],
        scale=x.cache.scale,
        block_table=x.cache.block_table,
        slice_tokens=slice_tokens,
        backend=backend,
    )
    assert isinstance(o, Tensor)
    return o


def our_contestant(case: PrefillCase, x: PrefillInputs, backend: str) -> Contestant:
    call = partial(prefill, x, backend, case.slice_tokens)

    def check() -> Results:
        o = call()
        assert bool(torch.isfinite(o).all()), f"{case.name}: gives NaN or Inf"
        return {"o": torch.cat([o[:, some] for some in checked_queries(case)], dim=1)}

    return Contestant(check=check, start=lambda: call)


def exact_results(case: PrefillCase, x: PrefillInputs) -> Results:
    """Queries in float64 make the reference compute so, on the cache as it is; it has all keys of one head at once."""
    heads = [of_one_head(x, g) for g in range(case.HK)]
    parts = [
        torch.cat([prefill(head, "reference", case.slice_tokens, some, torch.float64) for head in heads], dim=2)
        for some in checked_queries(case)
    ]
    return {"o": torch.cat(parts, dim=1)}


def of_one_head(x: PrefillInputs, g: int) -> PrefillInputs:
    """What a head of the up-projections and those that read it see."""
    each = x.q_nope.shape[2] // len(x.w_uk)
    q_nope, q_rope = (q[:, :, g * each : (g + 1) * each] for q in (x.q_nope, x.q_rope))
    return replace(x, q_nope=q_nope, q_rope=q_rope, w_uk=x.w_uk[g : g + 1], w_uv=x.w_uv[g : g + 1])


def block_contestant(form: BlockForm, block: Block) -> Contestant:
    def check() -> Results:
        return {"o": form(block)()[:CHECKED_QUERIES]}

    return Contestant(check=check, start=lambda: form(block))


def exact_block(block: Block) -> Results:
    """[CHECKED_QUERIES, H, V] of the first queries, a head of keys at a time."""
    heads = block.k.shape[2]
    q = block.q[0, :CHECKED_QUERIES].double().unflatten(1, (heads, -1))  # [queries, HK, H / HK, K]
    found = []
    for g in range(heads):
        k, v = block.k[0, :, g].double(), block.v[0, :, g].double()
        found.append((block.scale * q[:, g] @ k.mT).softmax(-1) @ v)
    return {"o": torch.stack(found, dim=1).flatten(1, 2)}


def run(case: PrefillCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """One row for each backend; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    generator = mla_absorb.seeded()
    x, block = draw(case, generator), draw_block(case, generator)
    able = {name: our_contestant(case, x, name) for name in backends}
    ours, _ = contest.prepare(case.name, able, {}, exact_results(case, x), MAX_ERROR)
    chosen = {name: block_contestant(form, block) for name, form in peers.FORMS.items() if name in chosen_peers}
    others = contest.prepare_peers(chosen, exact_block(block), MAX_ERROR)
    common = {
        **contest.described(case, "forward"),
        "page": case.page,
        "slice_tokens": case.slice_tokens,
    }
    for row in contest.rows(common, ours, others, work(case), roofs, seconds=SECONDS, host=False):
        yield compared_by_rate(row, case)


def compared_by_rate(row: dict[str, Any], case: PrefillCase) -> dict[str, Any]:
    """The row with FLOP a second on both sides; `ratio` is ours over the best peer's: above 1 is ahead."""
    of_block = block_work(case)
    entries = {
        name: {**contest.with_rates(entry, of_block), "bytes": of_block.bytes, "flop": of_block.flop}
        for name, entry in row["peers"].items()
    }
    row = contest.with_rates({**row, "peers": entries}, work(case))
    if row["best_peer"] is not None:
        row["ratio"] = row["flop_per_second"] / entries[row["best_peer"]]["flop_per_second"]
    return row
