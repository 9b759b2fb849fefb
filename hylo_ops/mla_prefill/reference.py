"""Eager PyTorch form of attention over an expanded latent cache: the specification."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype
from hylo_ops.mla_prefill.cache import rows


def mla_prefill(
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
    """Keys and values of the whole context, and one softmax over all of it; `slice_tokens` changes nothing."""
    compute = working_dtype(q_nope, kv_cache)
    tokens, width = q_nope.shape[1], w_uk.shape[2] + q_rope.shape[3]
    queries = torch.cat([q_nope, q_rope], dim=-1).to(compute)
    found = [(queries.new_zeros(0, *queries.shape[1:3], w_uv.shape[1]), queries.new_zeros(0, *queries.shape[1:3]))]
    for n, length in enumerate(lengths):
        latents = rows(kv_cache[..., :width], block_table, n, 0, length).to(compute)
        factors = None if key_scale is None else rows(key_scale, block_table, n, 0, length).to(compute)
        k, v = _expanded(latents, w_uk.to(compute), w_uv.to(compute), factors)
        new = min(tokens, length)  # more queries than tokens: the first ones stand before the sequence
        o, lse = _attend(queries[n, tokens - new :], k, v, scale)
        pad = torch.nn.functional.pad
        lse = pad(lse, (0, 0, tokens - new, 0), value=-torch.inf)
        found.append((pad(o, (0, 0, 0, 0, tokens - new, 0))[None], lse[None]))
    o, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
    return o.to(q_nope.dtype), lse.to(working_dtype(q_nope))


def _expanded(rows: Tensor, w_uk: Tensor, w_uv: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys [HK, S, N + E] and values [HK, S, V] of rows [S, R + E]."""
    latent, rope = rows.tensor_split((w_uk.shape[2],), dim=-1)
    k = torch.cat([latent @ w_uk.mT, rope.expand(len(w_uk), -1, -1)], dim=-1)
    if factors is not None:
        k = k * factors.mT[..., None]
    return k, latent @ w_uv.mT


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [T, H, N + E], the last T of S positions -> o [T, H, V], lse [T, H]."""
    grouped = q.transpose(0, 1).unflatten(0, (len(k), -1))  # [HK, H / HK, T, N + E]
    scores = scale * grouped @ k[:, None].mT
    unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(k.shape[1] - len(q) + 1)
    scores = scores.masked_fill(unseen, -torch.inf)
    o, lse = scores.softmax(-1) @ v[:, None], scores.logsumexp(-1)
    return o.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).mT
