"""A whole decode step of an MLA layer, between its down-projections and its output projection."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.fused import cuda_mla, triton_mla
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend
from hylo_ops.mla_absorb import reference as attention
from hylo_ops.mla_absorb.op import mla_absorb


def mla_step(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    cache_starts: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scale: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One more token of each sequence through latent attention; its row is written to `kv_cache` in place:

        kv_cache[position] <- (latent | rotate(rope) | rest) of kv_new
        o[h] = w_uv[h] mla_absorb(w_uk[h]^T q_nope[h], rotate(q_rope[h]), kv_cache)

    with rotate(u) = u cos + (-u2 | u1) sin for u of halves u1, u2.

    Dims: B batch, H heads, HK heads of the up-projections (divides H: head h reads h // (H / HK)), R latent rank,
        E rope width.
    Args:
        q_nope: [B, 1, H, nope] bf16 | fp16 | fp32 | fp64.
        q_rope: [B, 1, H, E], dtype of q_nope. Not yet rotated; E may be 0.
        kv_new: [B, 1, row]. Latent | rope, not yet rotated | the rest of a cache row, as it is.
        w_uk: [HK, nope, R]. Key up-projection.
        w_uv: [HK, v, R]. Value up-projection.
        kv_cache: [B, S, row], or [pages, page, row] with `block_table`; row >= R + E + key_scale. Updated in place.
        cache_seqlens: [B] int32 | int64. Tokens of each sequence, the new one included.
        position: [B] int32 | int64. Where in its sequence the new row goes; -1 is padding: zeros out, nothing written.
        cos: [B or 1, 1, E]. At the new token's position, with a factor of YaRN if there is one.
        sin: [B or 1, 1, E].
        scale: (nope + rope) ** -0.5 of the expanded head.
        cache_starts: [B] int32 | int64. First position that counts (left padding stands before it); 0 if None.
        block_table: [B, max pages] int32 | int64. Page of each page-long run of positions.
        key_scale: how many columns of a row, right behind the rope, are key scales (`mla_absorb`'s `key_scale` is the
            view of these columns; the number stands for it since this op writes what that view would show). Divides H.
        backend: None picks the first that supports the inputs; a named one never falls back. "composed" is PyTorch's
            own operators around `mla_absorb`.
    Returns:
        o: [B, 1, H, v], dtype of q_nope.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 from end to end (fp64 for fp64), rounded once into kv_cache and once into o; "cuda", "triton" and
        "composed" round to the dtype of q_nope also before and after the attention; not differentiable;
        deterministic: yes.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """
    if (backend is None or backend == "cuda") and may_skip_dispatcher():
        o = cuda_mla.direct()(  # one by one: a tuple to be unpacked takes 0.3 us
            q_nope, q_rope, kv_new, w_uk, w_uv, kv_cache, cache_seqlens, position, cos, sin, cache_starts, block_table,
            scale, key_scale,
        )  # fmt: skip
        if not isinstance(o, str):
            return o
    tensors = (q_nope, q_rope, kv_new, w_uk, w_uv, kv_cache, cache_seqlens, position, cos, sin)
    _check(*tensors, cache_starts, block_table, key_scale)
    return _step(*tensors, cache_starts, block_table, scale, key_scale, backend)


def _check(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: int | None,
) -> None:
    checks.shape("q_nope", q_nope, "B", 1, "H", "nope")
    checks.dtype("q_nope", q_nope, checks.FLOATS)
    batch, _, heads, nope = q_nope.shape
    checks.shape("q_rope", q_rope, batch, 1, heads, "E")
    checks.dtype("q_rope", q_rope, (q_nope.dtype,))
    checks.shape("w_uk", w_uk, "HK", nope, "R")
    checks.shape("w_uv", w_uv, w_uk.shape[0], "v", w_uk.shape[2])
    checks.multiple("the heads of q_nope", heads, "the heads of w_uk", w_uk.shape[0])
    rope = q_rope.shape[3]
    if rope % 2:
        raise ValueError(f"q_rope must have an even width, got {rope}")
    if key_scale is not None:
        checks.multiple("the heads of q_nope", heads, "key_scale", key_scale)
    row = w_uk.shape[2] + rope + (key_scale or 0)
    checks.latent_cache(kv_cache, cache_seqlens, cache_starts, block_table, batch, row)
    checks.shape("kv_new", kv_new, batch, 1, kv_cache.shape[2])
    checks.shape("position", position, batch)
    checks.dtype("position", position, (torch.int32, torch.int64))
    for name, table in (("cos", cos), ("sin", sin)):
        checks.shape(name, table, 1 if table.shape[0] == 1 else batch, 1, rope)
    others = {"w_uv": w_uv, "kv_cache": kv_cache, "cache_seqlens": cache_seqlens, "block_table": block_table}
    checks.same_device("q_nope", q_nope, q_rope=q_rope, kv_new=kv_new, w_uk=w_uk, **others)
    checks.same_device("q_nope", q_nope, position=position, cos=cos, sin=sin, cache_starts=cache_starts)


def _reference(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    key_scale: int | None,
) -> Tensor:
    compute = working_dtype(q_nope, kv_cache)
    width = w_uk.shape[2] + q_rope.shape[3]
    _write(kv_cache, _rotated_row(kv_new.to(compute), w_uk.shape[2], cos, sin), position, block_table)
    o, _ = attention.mla_absorb(
        _absorbed(q_nope.to(compute), w_uk.to(compute)),
        _rotate(q_rope.to(compute), cos[:, :, None], sin[:, :, None]),
        kv_cache,
        cache_seqlens.masked_fill(position < 0, 0),
        cache_starts,
        block_table,
        None if key_scale is None else kv_cache[..., width : width + key_scale],
        scale,
        True,
        False,
    )
    return _expanded(o, w_uv.to(compute)).to(q_nope.dtype)


# Heads that read the same up-projection stand side by side.
def _absorbed(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """[B, 1, H, nope] -> [B, 1, H, R]."""
    return torch.einsum("btgqn,gnr->btgqr", q_nope.unflatten(2, (w_uk.shape[0], -1)), w_uk).flatten(2, 3)


def _expanded(o: Tensor, w_uv: Tensor) -> Tensor:
    """[B, 1, H, R] -> [B, 1, H, v]."""
    heads = torch.einsum("btgqr,gvr->btgqv", o.unflatten(2, (w_uv.shape[0], -1)), w_uv)
    return heads.flatten(2, 3).contiguous()


def _rotated_row(kv_new: Tensor, rank: int, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, row], as the cache has it."""
    latent, rope, rest = kv_new.tensor_split((rank, rank + cos.shape[2]), dim=-1)
    return torch.cat([latent, _rotate(rope, cos, sin), rest], dim=-1)[:, 0]


def _rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = u.chunk(2, dim=-1)
    return u * cos.to(u.dtype) + torch.cat([-second, first], dim=-1) * sin.to(u.dtype)


def _write(kv_cache: Tensor, rows: Tensor, position: Tensor, block_table: Tensor | None) -> None:
    used = (position >= 0).nonzero()[:, 0]
    outer, slot = used, position[used].long()
    if block_table is not None:
        page = kv_cache.shape[1]
        outer, slot = block_table[used, slot // page].long(), slot % page
    kv_cache[outer, slot] = rows[used].to(kv_cache.dtype)


def _composed(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_new: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    key_scale: int | None,
) -> Tensor:
    compute, dtype = working_dtype(q_nope, kv_cache), q_nope.dtype
    width = w_uk.shape[2] + q_rope.shape[3]
    row = _rotated_row(kv_new.to(compute), w_uk.shape[2], cos, sin).to(kv_cache.dtype)
    _write_without_waiting(kv_cache, row, position, block_table)
    o = mla_absorb(
        _absorbed(q_nope, w_uk.to(dtype)),
        _rotate(q_rope.to(compute), cos[:, :, None], sin[:, :, None]).to(dtype),
        kv_cache,
        cache_seqlens=cache_seqlens.masked_fill(position < 0, 0),
        scale=scale,
        cache_starts=cache_starts,
        block_table=block_table,
        key_scale=None if key_scale is None else kv_cache[..., width : width + key_scale],
    )
    assert isinstance(o, Tensor)
    return _expanded(o, w_uv.to(dtype))


def _write_without_waiting(kv_cache: Tensor, rows: Tensor, position: Tensor, block_table: Tensor | None) -> None:
    """As `_write`, without the host knowing which rows are padding: those repeat what the first other one writes."""
    if not len(position):
        return
    used = position >= 0
    from_row = torch.where(used, torch.arange(len(used), device=used.device), used.int().argmax(0))
    outer, slot = from_row, position.long()[from_row].clamp(min=0)
    if block_table is not None:
        page = kv_cache.shape[1]
        # where all is padding, the table may hold anything
        outer, slot = block_table[from_row, slot // page].long().clamp(0, len(kv_cache) - 1), slot % page
    kv_cache[outer, slot] = torch.where(used.any(), rows[from_row], kv_cache[outer, slot])


def _composed_why_not(q_nope: Tensor, **_: Any) -> str | None:
    """On a CPU the reference does the same and rounds less often."""
    return None if q_nope.is_cuda else f"q_nope is on {q_nope.device}, not on a CUDA device"


BACKENDS = [
    Backend("cuda", cuda_mla.why_not, cuda_mla.forward),
    Backend("triton", triton_mla.why_not, triton_mla.forward),
    Backend("composed", _composed_why_not, _composed),
    reference_backend(_reference),
]

_step = define_op(
    "mla_step",
    "(Tensor q_nope, Tensor q_rope, Tensor kv_new, Tensor w_uk, Tensor w_uv, Tensor(a!) kv_cache, "
    "Tensor cache_seqlens, Tensor position, Tensor cos, Tensor sin, Tensor? cache_starts, Tensor? block_table, "
    "float scale, int? key_scale, str? backend) -> Tensor",
    backends=BACKENDS,
    fake=lambda q_nope, q_rope, kv_new, w_uk, w_uv, *_: q_nope.new_empty(*q_nope.shape[:3], w_uv.shape[1]),
)
