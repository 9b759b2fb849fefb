"""Public function of absorbed latent attention."""

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend
from hylo_ops.mla_absorb import cuda, fp8, reference, triton


def mla_absorb(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    scale: float,
    cache_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scale: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
    fixed_split: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of T new tokens over a cache of latents that serve all heads as keys and as values:

        p = softmax_s(scale key_scale[s, h] (q_nope[h] . latent_s + q_rope[h] . rope_s));   o[h] = sum_s p_s latent_s

    Dims: B batch, T new tokens, H heads, HK heads of the key scales, R latent rank, E rope width, S cached tokens.
    Args:
        q_nope: [B, T, H, R] bf16 | fp16 | fp32 | fp64. Already multiplied by the key up-projection.
        q_rope: [B, T, H, E], dtype of q_nope. Rotated; E may be 0.
        kv_cache: [B, S, row], or [pages, page, row] with `block_table`; row >= R + E: latent | rope | anything.
            uint8 (or float8_e4m3fn, taken as bytes): rows in fp8 as `quantize_kv_cache` makes them, whose rope has the
            dtype of q_nope, bf16 | fp16; row, in bytes, >= fp8_row_bytes(R, E), all rows at multiples of 16 bytes.
        cache_seqlens: [B] int32 | int64. Tokens of each sequence in the cache, the T new ones included.
        scale: (nope + rope) ** -0.5 of the expanded head, not of R + E.
        cache_starts: [B] int32 | int64. First position that counts (left padding stands before it); 0 if None.
        block_table: [B, max pages] int32 | int64. Page of each page-long run of positions; entries that
            `cache_seqlens` does not reach are never used.
        key_scale: [B, S, HK] or [pages, page, HK], laid out as the cache; head h reads h // (H / HK). Usually the view
            `kv_cache[..., R + E :]`; of a cache in fp8 a view that `fp8_row_parts` gives.
        causal: new token t sees the first `cache_seqlens - T + t + 1` positions, less those before
            `cache_starts`; without, all up to `cache_seqlens`.
        return_lse: also return the log of the sum of exponentials.
        fixed_split: the same bits for a sequence whatever else is in the batch.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, T, H, R], dtype of q_nope, still to be multiplied by the value up-projection. A token that sees nothing
            gets zeros.
        lse: [B, T, H] fp32 (fp64 with fp64 inputs), natural log; -inf for a token that sees nothing.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 scores and accumulation (fp64 for fp64); o and lse are differentiable in q_nope, q_rope, key_scale
        and kv_cache, unless that is in fp8; rows before `cache_starts` or past `cache_seqlens` reach neither a result
        nor a gradient, NaN or not; deterministic: yes.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2 and appendix C.
    """
    if (backend is None or backend == "cuda") and may_skip_dispatcher():
        results = cuda.direct()(  # one by one: a tuple to be unpacked takes 0.3 us
            q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale,
            scale, causal, fixed_split, return_lse,
        )  # fmt: skip
        if not isinstance(results, str):
            return results
    if kv_cache.dtype == torch.float8_e4m3fn:
        kv_cache = _as_bytes(kv_cache)
    tensors = (q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale)
    _check(*tensors)
    o, lse = _forward(*tensors, scale, causal, fixed_split, backend)
    return (o, lse) if return_lse else o


def _as_bytes(kv_cache: Tensor) -> Tensor:
    if kv_cache.requires_grad:
        raise ValueError("kv_cache must not require a gradient in fp8, got one that does")
    return kv_cache.view(fp8.BYTES)


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
) -> None:
    checks.shape("q_nope", q_nope, "B", "T", "H", "R")
    checks.dtype("q_nope", q_nope, checks.FLOATS)
    checks.shape("q_rope", q_rope, *q_nope.shape[:3], "E")
    checks.dtype("q_rope", q_rope, (q_nope.dtype,))
    batch, _, heads, rank = q_nope.shape
    least_row = rank + q_rope.shape[3]
    if kv_cache.dtype == fp8.BYTES:
        checks.dtype("q_nope over an fp8 kv_cache", q_nope, fp8.HALVES)
        least_row = fp8.fp8_row_bytes(rank, q_rope.shape[3])
    dtypes = (*checks.FLOATS, fp8.BYTES)
    checks.latent_cache(kv_cache, cache_seqlens, cache_starts, block_table, batch, least_row, dtypes)
    if kv_cache.dtype == fp8.BYTES and (reason := fp8.why_not_aligned(kv_cache)) is not None:
        raise ValueError(reason)
    if key_scale is not None:
        checks.shape("key_scale", key_scale, *kv_cache.shape[:2], "HK")
        checks.dtype("key_scale", key_scale, checks.FLOATS)
        checks.multiple("the heads of q_nope", heads, "the heads of key_scale", key_scale.shape[2])
    checks.same_device(
        "q_nope",
        q_nope,
        q_rope=q_rope,
        kv_cache=kv_cache,
        cache_seqlens=cache_seqlens,
        cache_starts=cache_starts,
        block_table=block_table,
        key_scale=key_scale,
    )


def _fake_forward(q_nope: Tensor, q_rope: Tensor, kv_cache: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q_nope.new_empty(q_nope.shape[:3], dtype=working_dtype(q_nope, kv_cache))
    return torch.empty_like(q_nope, memory_format=torch.contiguous_format), lse


_DIFFERENTIABLE = ("q_nope", "q_rope", "kv_cache", "key_scale")

# Gradients of an inference op are for checks and short distillation runs: every backend's are the reference's.
_REFERENCE = reference_backend(reference.mla_absorb, _DIFFERENTIABLE)

BACKENDS = [
    Backend("cuda", cuda.why_not, cuda.forward, _REFERENCE.backward),
    Backend("triton", triton.why_not, triton.forward, _REFERENCE.backward),
    _REFERENCE,
]

_forward = define_op(
    "mla_absorb",
    "(Tensor q_nope, Tensor q_rope, Tensor kv_cache, Tensor cache_seqlens, Tensor? cache_starts, "
    "Tensor? block_table, Tensor? key_scale, float scale, bool causal, bool fixed_split, str? backend) "
    "-> (Tensor, Tensor)",
    backends=BACKENDS,
    fake=_fake_forward,
    differentiable=_DIFFERENTIABLE,
)
