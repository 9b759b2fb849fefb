"""Public function of attention over an expanded latent cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, reference_backend
from hylo_ops.mla_prefill import reference, sliced


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    lengths: Sequence[int],
    scale: float,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    slice_tokens: int = 32768,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a chunk of T new tokens to the whole cache before it and causally to itself, by expanded keys:

        k[s, g] = key_scale[s, g] (w_uk[g] latent_s | rope_s);   v[s, g] = w_uv[g] latent_s;   g = h // (H / HK)
        o[t, h] = sum_s p_s v[s, g];   p = softmax_s(scale (q_nope[t, h] | q_rope[t, h]) . k[s, g])

    The cache already holds the rows of the new tokens: they are the last T positions of each sequence.

    Dims: B batch, T new tokens, H heads, HK heads of the up-projections (divides H), N nope width, E rope width,
        R latent rank, V value width, S cached tokens.
    Args:
        q_nope: [B, T, H, N] bf16 | fp16 | fp32 | fp64. Not absorbed: not yet multiplied by w_uk.
        q_rope: [B, T, H, E], dtype of q_nope. Rotated; E may be 0.
        kv_cache: [B, S, row], or [pages, page, row] with `block_table`; row >= R + E: latent | rope | anything.
        w_uk: [HK, N, R]. Key up-projection.
        w_uv: [HK, V, R]. Value up-projection.
        lengths: tokens of each sequence in the cache, the T new ones included. Integers, not a tensor: the host
            launches as many slices as the context has, and reading a number from the device would make it wait
            for all work in flight. A scheduler has the lengths on the host anyway. With fewer tokens than T, the first
            T - length queries are padding.
        scale: (N + E) ** -0.5.
        block_table: [B, max pages] int32 | int64. Page of each page-long run of positions; entries that `lengths` does
            not reach are never used.
        key_scale: [B, S, HK] or [pages, page, HK], laid out as the cache. Usually the view `kv_cache[..., R + E :]`.
        slice_tokens: how many tokens are expanded at once; bounds the memory.
        return_lse: also return the log of the sum of exponentials.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, T, H, V], dtype of q_nope. A token that sees nothing gets zeros.
        lse: [B, T, H] fp32 (fp64 with fp64 queries), natural log; -inf for a token that sees nothing.
    Raises:
        ValueError: a shape, dtype, length or slice above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: "sliced" rounds keys, values and each slice's o to the dtype of q_nope, as eager PyTorch would, and
        merges slices in fp32 (fp64 for fp64); "reference" computes in fp32 (fp64) from end to end. For inference:
        gradients in q_nope, q_rope, kv_cache, w_uk, w_uv and key_scale are the reference's on all backends, and need
        memory for all scores. Rows past `lengths` reach neither a result nor a gradient, NaN or not. Deterministic:
        where PyTorch's attention is.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; the merge of two parts of a softmax: FlashAttention
        (arXiv 2205.14135), section 3.1.
    """
    _check(q_nope, q_rope, kv_cache, w_uk, w_uv, block_table, key_scale)
    _check_on_the_host(kv_cache, block_table, lengths, q_nope.shape[0], slice_tokens)
    o, lse = _forward(
        q_nope, q_rope, kv_cache, w_uk, w_uv, block_table, key_scale, lengths, scale, slice_tokens, backend
    )
    return (o, lse) if return_lse else o


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    block_table: Tensor | None,
    key_scale: Tensor | None,
) -> None:
    checks.shape("q_nope", q_nope, "B", "T", "H", "N")
    checks.dtype("q_nope", q_nope, checks.FLOATS)
    batch, tokens, heads, nope = q_nope.shape
    checks.shape("q_rope", q_rope, batch, tokens, heads, "E")
    checks.dtype("q_rope", q_rope, (q_nope.dtype,))
    checks.shape("w_uk", w_uk, "HK", nope, "R")
    checks.shape("w_uv", w_uv, w_uk.shape[0], "V", w_uk.shape[2])
    checks.multiple("the heads of q_nope", heads, "the heads of w_uk", w_uk.shape[0])
    for name, weight in (("w_uk", w_uk), ("w_uv", w_uv)):
        checks.dtype(name, weight, checks.FLOATS)
    checks.latent_cache(kv_cache, None, None, block_table, batch, w_uk.shape[2] + q_rope.shape[3])
    if key_scale is not None:
        checks.shape("key_scale", key_scale, *kv_cache.shape[:2], w_uk.shape[0])
        checks.dtype("key_scale", key_scale, checks.FLOATS)
    others = {"kv_cache": kv_cache, "w_uk": w_uk, "w_uv": w_uv, "block_table": block_table, "key_scale": key_scale}
    checks.same_device("q_nope", q_nope, q_rope=q_rope, **others)


def _check_on_the_host(
    kv_cache: Tensor, block_table: Tensor | None, lengths: Sequence[int], batch: int, slice_tokens: int
) -> None:
    if isinstance(lengths, Tensor) or not all(isinstance(length, int | torch.SymInt) for length in lengths):
        raise ValueError(f"lengths must be integers on the host, got {lengths!r}")
    if len(lengths) != batch:
        raise ValueError(f"lengths must have one entry a sequence ({batch}), got {list(lengths)}")
    capacity = kv_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    for length in lengths:
        if not 0 <= length <= capacity:
            raise ValueError(f"lengths must be 0 to {capacity}, the tokens a sequence can hold, got {length}")
    if slice_tokens < 1:
        raise ValueError(f"slice_tokens must be at least 1, got {slice_tokens}")


def _fake_forward(
    q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, w_uk: Tensor, w_uv: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    o = q_nope.new_empty(*q_nope.shape[:3], w_uv.shape[1])
    return o, q_nope.new_empty(q_nope.shape[:3], dtype=working_dtype(q_nope))


_DIFFERENTIABLE = ("q_nope", "q_rope", "kv_cache", "w_uk", "w_uv", "key_scale")

# Gradients of an inference op are for checks: every backend's are the reference's.
_REFERENCE = reference_backend(reference.mla_prefill, _DIFFERENTIABLE)

BACKENDS = [Backend("sliced", sliced.why_not, sliced.forward, _REFERENCE.backward), _REFERENCE]

_forward = define_op(
    "mla_prefill",
    "(Tensor q_nope, Tensor q_rope, Tensor kv_cache, Tensor w_uk, Tensor w_uv, Tensor? block_table, "
    "Tensor? key_scale, SymInt[] lengths, float scale, SymInt slice_tokens, str? backend) -> (Tensor, Tensor)",
    backends=BACKENDS,
    fake=_fake_forward,
    differentiable=_DIFFERENTIABLE,
)
