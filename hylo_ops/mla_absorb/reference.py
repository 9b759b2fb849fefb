"""Eager PyTorch form of absorbed latent attention: the specification, and the CPU backend.

The merging of slices is derived in docs/mla_absorb.md.
"""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype
from hylo_ops.mla_absorb import fp8

_SLICE = 512  # cached tokens a slice, rounded down to whole pages


def step_by_step(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The definition: one softmax for each sequence and each new token."""
    _, length, heads, rank = q_nope.shape
    o, lse = q_nope.new_zeros(q_nope.shape), q_nope.new_full(q_nope.shape[:3], -torch.inf)
    starts = [0] * len(q_nope) if cache_starts is None else cache_starts.tolist()
    for n, (start, cached) in enumerate(zip(starts, cache_seqlens.tolist(), strict=True)):
        rows = _all_rows(kv_cache, block_table, n, cached)
        factors = None if key_scale is None else _all_rows(key_scale, block_table, n, cached)
        for t in range(length):
            seen = cached - length + t + 1 if causal else cached
            if seen <= start:
                continue
            keys = rows[start:seen, : rank + q_rope.shape[3]]
            scores = scale * torch.cat([q_nope[n, t], q_rope[n, t]], dim=-1) @ keys.mT  # [H, row] @ [row, seen]
            if factors is not None:
                scores = scores * factors[start:seen].mT.repeat_interleave(heads // factors.shape[1], dim=0)
            o[n, t] = scores.softmax(-1) @ keys[:, :rank]
            lse[n, t] = scores.logsumexp(-1)
    return o, lse


def mla_absorb(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    scale: float,
    causal: bool,
    fixed_split: bool,
) -> tuple[Tensor, Tensor]:
    """Slices of the cache, merged through a running maximum and a running sum.

    `fixed_split` runs one sequence after the other: slices end where the longest sequence does, and a CPU's batched
    products round a sequence differently beside others.
    """
    if not fixed_split or len(q_nope) < 2:
        return _attend(q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale, scale, causal)
    parts = []
    for n in range(len(q_nope)):
        one = slice(n, n + 1)
        cache, table, factors = kv_cache, block_table, key_scale
        if table is None:
            cache, factors = cache[one], None if factors is None else factors[one]
        else:
            table = table[one]
        starts = None if cache_starts is None else cache_starts[one]
        parts.append(
            _attend(q_nope[one], q_rope[one], cache, cache_seqlens[one], starts, table, factors, scale, causal)
        )
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts])


def _attend(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    compute = working_dtype(q_nope, kv_cache)
    batch, length, heads, rank = q_nope.shape
    width = rank + q_rope.shape[3]
    queries = scale * torch.cat([q_nope, q_rope], dim=-1).to(compute).flatten(1, 2)  # [B, T * H, R + E]
    newest = torch.arange(1 - length, 1, device=q_nope.device) if causal else cache_seqlens.new_zeros(1)
    limit = (cache_seqlens[:, None] + newest)[:, :, None, None]  # [B, T | 1, 1, 1]: positions each new token sees

    top = queries.new_full(queries.shape[:2], -torch.inf)
    total = queries.new_zeros(queries.shape[:2])
    o = queries.new_zeros(*queries.shape[:2], rank)
    for begin, end in _slices(kv_cache, cache_seqlens, block_table):
        position = torch.arange(begin, end, device=q_nope.device)
        used = position < cache_seqlens[:, None]
        if cache_starts is not None:
            used &= position >= cache_starts[:, None]
        used = used[..., None]  # [B, S, 1]
        keys = _keys(kv_cache, begin, end, block_table, used, (rank, width, q_nope.dtype), compute)
        scores = (queries @ keys.mT).view(batch, length, heads, end - begin)
        if key_scale is not None:
            factors = _rows(key_scale, begin, end, block_table, used, compute).mT[:, None, :, None]  # [B, 1, HK, 1, S]
            scores = (scores.unflatten(2, (key_scale.shape[2], -1)) * factors).flatten(2, 3)
        unseen = (position >= limit) | ~used.mT[:, None]  # [B, T | 1, 1, S]
        scores = scores.masked_fill(unseen, -torch.inf).flatten(1, 2)

        # o and lse do not depend on the reference point of the exponentials, so no gradient goes through it
        new_top = torch.maximum(top, scores.detach().amax(-1))
        point = new_top.masked_fill(new_top == -torch.inf, 0)  # nothing seen so far: -inf minus -inf would be NaN
        weights, kept = (scores - point[..., None]).exp(), (top - point).exp()
        total = kept * total + weights.sum(-1)
        o = kept[..., None] * o + weights @ keys[..., :rank]  # [T * H, S] @ [S, R]
        top = new_top

    total = total.masked_fill(total == 0, 1)  # for tokens that see nothing: o is 0, and top, so lse, is -inf
    lse = (top + total.log()).view(batch, length, heads)
    return (o / total[..., None]).view(q_nope.shape).to(q_nope.dtype), lse


def _slices(kv_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> list[tuple[int, int]]:
    """Bounds of the slices up to the longest sequence, in whole pages; reads `cache_seqlens` on the host."""
    page = 1 if block_table is None else kv_cache.shape[1]
    capacity = kv_cache.shape[1] if block_table is None else block_table.shape[1] * page
    longest = max(cache_seqlens.tolist(), default=0)
    if longest > capacity:
        raise ValueError(f"cache_seqlens must be at most {capacity}, the tokens a sequence can hold, got {longest}")
    stride, last = max(_SLICE // page, 1) * page, -(-longest // page) * page
    return [(begin, min(begin + stride, last)) for begin in range(0, last, stride)]


def _keys(
    cache: Tensor,
    begin: int,
    end: int,
    block_table: Tensor | None,
    used: Tensor,
    row: tuple[int, int, torch.dtype],
    compute: torch.dtype,
) -> Tensor:
    """[B, S, R + E] of the slice, as `_rows`; row: R, R + E, and the dtype of the rope in a cache in fp8."""
    rank, width, dtype = row
    if cache.dtype != fp8.BYTES:
        return _rows(cache[..., :width], begin, end, block_table, used, compute)
    coded = _fetch(cache, begin, end, block_table, used)
    rows = fp8.dequantize_kv_cache(coded, latent_rank=rank, width=width, dtype=dtype, out_dtype=compute)
    return rows.masked_fill(~used, 0)


def _rows(
    cache: Tensor, begin: int, end: int, block_table: Tensor | None, used: Tensor, compute: torch.dtype
) -> Tensor:
    """[B, S, row] of the slice; unused rows become zeros, whatever they hold, in value and in gradient."""
    return _fetch(cache, begin, end, block_table, used).to(compute).masked_fill(~used, 0)


def _fetch(cache: Tensor, begin: int, end: int, block_table: Tensor | None, used: Tensor) -> Tensor:
    """[B, S, row] of the slice as it is, unused rows being any."""
    if block_table is None:
        return cache[:, begin:end]
    page = cache.shape[1]
    pages = block_table[:, begin // page : end // page].long()
    # an entry of the table that no used position needs may hold anything
    pages = pages.masked_fill(~used[..., 0].unflatten(1, (-1, page)).any(-1), 0)
    return cache.index_select(0, pages.flatten()).view(len(pages), end - begin, cache.shape[2])


def _all_rows(cache: Tensor, block_table: Tensor | None, n: int, cached: int) -> Tensor:
    if block_table is None:
        return cache[n]
    pages = -(-cached // cache.shape[1])
    return cache[block_table[n, :pages].long()].flatten(0, 1)
