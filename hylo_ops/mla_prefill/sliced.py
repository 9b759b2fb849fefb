"""The cache is expanded slice by slice, and the slices' results merged (derived in docs/mla_prefill.md)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype
from hylo_ops.mla_prefill.cache import rows
from hylo_ops.mla_prefill.engines import attend

Expand = Callable[[int, int], tuple[Tensor, Tensor]]


def why_not(**_: Any) -> str | None:
    """Where no fused attention takes a slice, an eager one does."""
    return None


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    lengths: Sequence[int],
    scale: float,
    slice_tokens: int,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q_nope.shape
    queries = torch.cat([q_nope, q_rope], dim=-1).transpose(1, 2)  # [B, H, T, N + E]
    weights = _joined(w_uk, w_uv, q_rope.shape[3]).to(q_nope.dtype)
    o = q_nope.new_zeros(batch, tokens, heads, w_uv.shape[1])
    lse = q_nope.new_full((batch, tokens, heads), -torch.inf, dtype=torch.float64)
    for n, length in enumerate(lengths):

        def expand(begin: int, end: int, n: int = n) -> tuple[Tensor, Tensor]:
            cached = rows(kv_cache[..., : weights.shape[0]], block_table, n, begin, end).to(weights.dtype)
            factors = None if key_scale is None else rows(key_scale, block_table, n, begin, end)
            return _expanded(cached, weights, len(w_uk), w_uv.shape[1], factors)

        blind = tokens - min(tokens, length)  # queries that stand before the sequence
        o[n, blind:] = _attend_slices(
            queries[n : n + 1, :, blind:], expand, lse[n, blind:], w_uv.shape[1], length, slice_tokens, scale
        )
    return o, lse.to(working_dtype(q_nope))


def _attend_slices(
    q: Tensor, expand: Expand, lse: Tensor, value: int, length: int, slice_tokens: int, scale: float
) -> Tensor:
    """o [T, H, V] in fp32 (fp64) of q [1, H, T, K], the last T of `length` positions; fills `lse` [T, H]."""
    past = length - q.shape[2]
    o = lse.new_zeros(*lse.shape, value, dtype=working_dtype(q))
    for begin, end in _slices(past, length, slice_tokens):
        k, v = expand(begin, end)
        above = max(end - past, 0)  # queries from here on see the whole slice
        if begin >= past:
            square = slice(begin - past, above)
            merge_(o[square], lse[square], *attend(q[:, :, square], k, v, scale, True))
        if above < q.shape[2]:
            merge_(o[above:], lse[above:], *attend(q[:, :, above:], k, v, scale, False))
        del k, v  # the next slice's are made where these were
    return o


def _slices(past: int, length: int, slice_tokens: int) -> Iterator[tuple[int, int]]:
    """Slices of what stood before the new tokens, then of the new tokens: none holds both."""
    for first, last in ((0, past), (past, length)):
        for begin in range(first, last, slice_tokens):
            yield begin, min(begin + slice_tokens, last)


def merge_(o: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds to the softmax so far (o [T, H, V], lse [T, H] in fp64) that over other keys, in place.

    A query that saw nothing in one of the two, lse = -inf, keeps the other's result. lse is about the log of the
    number of keys, and its rounding is one of all weights: in fp32 that would add up over the slices.
    """
    weight = torch.sigmoid(part_lse - lse).masked_fill(part_lse == -torch.inf, 0)  # both -inf: their difference is NaN
    o.lerp_(part.to(o.dtype), weight[..., None].to(o.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))


def _joined(w_uk: Tensor, w_uv: Tensor, rope: int) -> Tensor:
    """[R + E, HK * (N + E + V)]: a product with a row makes k_nope, a copy of the rope key, and v for each head."""
    heads, nope, rank = w_uk.shape
    joined = w_uk.new_zeros(heads, nope + rope + w_uv.shape[1], rank + rope)
    joined[:, :nope, :rank] = w_uk
    joined[:, nope : nope + rope, rank:] = torch.eye(rope, dtype=w_uk.dtype, device=w_uk.device)
    joined[:, nope + rope :, :rank] = w_uv
    return joined.flatten(0, 1).T


def _expanded(cached: Tensor, weights: Tensor, heads: int, value: int, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows [S, R + E] -> keys [1, HK, S, N + E] and values [1, HK, S, V], views of one tensor."""
    expanded = (cached @ weights).unflatten(1, (heads, -1)).transpose(0, 1)[None]
    k, v = expanded.split([expanded.shape[3] - value, value], dim=-1)
    if factors is not None:
        k.mul_(factors.mT[None, ..., None])
    return k, v
