"""Absorbed latent attention in other libraries.

Plans, schedules, page lists and the layouts of the cache that a library wants are made outside the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Missing, imported

_FLASHINFER_WORKSPACE = 256 << 20  # bytes
_TOKENS_A_SPLIT, _SPLITS_A_PROCESSOR = 512, 2  # how vLLM cuts sequences for its Triton kernel


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """What every contestant reads: the cache of latent | rope, and which tokens each sequence has.

    Args:
        copies: [pages, page, R + E] each, all alike; calls take them in turn.
        fp8_copies: [pages, page, bytes] each, in fp8, where there are such: `copies` are what they stand for then.
        lengths: tokens of each sequence, as the host knows them; `cache_seqlens` [B] int32 is the same on the device.
        block_table: [B, max pages] int32; unused entries are 0.
    """

    copies: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    cache_seqlens: Tensor
    block_table: Tensor
    H: int
    R: int
    E: int
    scale: float
    fp8_copies: tuple[Tensor, ...] = ()

    @property
    def page(self) -> int:
        return self.copies[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.copies[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.copies[0].dtype

    @cached_property
    def position(self) -> Tensor:
        """[B] int32: of the newest token in its sequence."""
        return self.cache_seqlens - 1

    @cached_property
    def slots(self) -> Tensor:
        """[B] int64: where the newest token of each sequence lies in a copy that is flattened to rows."""
        position = self.position.long()
        pages = self.block_table.long().gather(1, position[:, None] // self.page)[:, 0]
        return pages * self.page + position % self.page

    @cached_property
    def rope_in_blocks(self) -> tuple[Tensor, ...]:
        """The copies with a rope of whole blocks of 64, filled up with zeros; made once for all who want them."""
        missing = -self.E % 64
        return tuple(F.pad(copy, (0, missing)) for copy in self.copies) if missing else self.copies

    @cached_property
    def contiguous(self) -> tuple[Tensor, ...]:
        """The copies as [B, S, R + E], S of the longest sequence in whole pages."""
        return tuple(copy[self.block_table.long()].flatten(1, 2) for copy in self.copies)


@dataclass(frozen=True)
class Attention:
    """Attention in the form that its library has.

    Args:
        copies: of the cache in its layout: rows begin with latent | rope.
        slots: [B] int64. Where each sequence's newest token lies in a copy flattened to rows.
        pack: gives what `attend` takes of q_nope [B, 1, H, R] and q_rope [B, 1, H, E].
        attend: what the clock sees of attention alone, on one of the copies; gives o [B, 1, H, R].
    """

    copies: tuple[Tensor, ...]
    slots: Tensor
    pack: Callable[[Tensor, Tensor], Any]
    attend: Callable[[Any, Tensor], Tensor]


AttentionForm = Callable[[LatentCache], Attention]


def _joined(q_nope: Tensor, q_rope: Tensor) -> Tensor:
    return torch.cat([q_nope, q_rope], dim=-1)


def _bounds(lengths: list[int], device: torch.device) -> Tensor:
    """[N + 1] int32: where each of so many things begins, and the end."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _flashinfer(backend: str, cache: LatentCache) -> Attention:
    wrapper_type = imported("flashinfer.mla", "BatchMLAPagedAttentionWrapper")
    R, E = cache.R, cache.E
    if R % 128 or (backend == "fa3" and R not in (128, 256, 512)):
        raise Missing(f"its {backend} kernel does not take a latent of {R}")
    batch, page = len(cache.lengths), cache.page
    counts = [-(-length // page) for length in cache.lengths]
    wrapper = wrapper_type(torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=cache.device), backend=backend)
    wrapper.plan(
        qo_indptr=_bounds([1] * batch, cache.device),
        kv_indptr=_bounds(counts, cache.device),
        kv_indices=torch.cat([pages[:count] for pages, count in zip(cache.block_table, counts, strict=True)]),
        kv_len_arr=cache.cache_seqlens,
        num_heads=cache.H,
        head_dim_ckv=R,
        head_dim_kpe=E + -E % 64,
        page_size=page,
        causal=False,
        sm_scale=cache.scale,
        q_data_type=cache.dtype,
        kv_data_type=cache.dtype,
    )

    def pack(q_nope: Tensor, q_rope: Tensor) -> tuple[Tensor, Tensor]:
        return q_nope[:, 0], (F.pad(q_rope, (0, -E % 64)) if E % 64 else q_rope)[:, 0]

    def attend(query: tuple[Tensor, Tensor], copy: Tensor) -> Tensor:
        o: Tensor = wrapper.run(query=query, kv_cache=(copy[..., :R], copy[..., R:]))
        return o[:, None]

    return Attention(cache.rope_in_blocks, cache.slots, pack, attend)


def _fa3(cache: LatentCache) -> Attention:
    """Keys of the rope and values of the latent with a second query for the latter, where its kernels have that; below,
    one key head of all columns, whose values are a view of the first.
    """
    attention = imported("vllm.vllm_flash_attn", "flash_attn_varlen_func")
    schedule = imported("vllm.vllm_flash_attn", "get_scheduler_metadata")
    R, E = cache.R, cache.E
    second_query = R in (256, 512) and E <= 64
    if not second_query and not (R <= 128 and R + E <= 192):
        raise Missing(f"has no kernel for keys of {R + E} and values of {R}, nor a second query of {R}")
    bounds = _bounds([1] * len(cache.lengths), cache.device)
    common: dict[str, Any] = {"max_seqlen_q": 1, "cu_seqlens_q": bounds, "max_seqlen_k": max(cache.lengths)}
    metadata = schedule(
        batch_size=len(cache.lengths),
        num_heads_q=cache.H,
        num_heads_kv=1,
        headdim=E if second_query else R + E,
        headdim_v=R,
        cache_seqlens=cache.cache_seqlens,
        qkv_dtype=cache.dtype,
        page_size=cache.page,
        causal=True,
        num_splits=0,
        **common,
    )

    def pack(q_nope: Tensor, q_rope: Tensor) -> dict[str, Tensor]:
        if second_query:
            return {"q": q_rope[:, 0], "q_v": q_nope[:, 0]}
        return {"q": _joined(q_nope, q_rope)[:, 0]}

    def attend(query: dict[str, Tensor], copy: Tensor) -> Tensor:
        rows = copy[:, :, None]  # [pages, page, 1, R + E]
        o: Tensor = attention(
            **query,
            k=rows[..., R:] if second_query else rows,
            v=rows[..., :R],
            seqused_k=cache.cache_seqlens,
            block_table=cache.block_table,
            softmax_scale=cache.scale,
            causal=True,
            fa_version=3,
            scheduler_metadata=metadata,
            num_splits=0,
            **common,
        )
        return o[:, None]

    return Attention(cache.copies, cache.slots, pack, attend)


def _flash_mla(cache: LatentCache) -> Attention:
    if (cache.R, cache.E, cache.page) != (512, 64, 64):
        raise Missing("takes a latent of 512, a rope of 64 and pages of 64 only")
    attention = imported("flash_mla", "flash_mla_with_kvcache")
    schedule, _ = imported("flash_mla", "get_mla_metadata")()  # filled by the first call, kept for all that follow

    def attend(query: Tensor, copy: Tensor) -> Tensor:
        o: Tensor
        o, _ = attention(
            *(query, copy[:, :, None], cache.block_table, cache.cache_seqlens, cache.R, schedule),
            softmax_scale=cache.scale,
            causal=False,
        )
        return o

    return Attention(cache.copies, cache.slots, _joined, attend)


def _vllm_triton(cache: LatentCache) -> Attention:
    attention = imported("vllm.v1.attention.ops.triton_decode_attention", "decode_attention_fwd")
    if cache.copies[0].numel() >= 2**31:
        raise Missing("computes page offsets in 32 bits, and the cache has 2^31 numbers or more")
    R, device = cache.R, cache.device
    wanted = max(max(cache.lengths) // _TOKENS_A_SPLIT, 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(1 << (wanted - 1).bit_length(), _SPLITS_A_PROCESSOR * processors)
    heads = len(cache.lengths), cache.H
    partial_results = torch.empty(*heads, splits, R + 1, device=device)
    o, lse = torch.empty(*heads, R, dtype=cache.dtype, device=device), torch.empty(heads, device=device)
    one = torch.ones((), device=device)  # the scale of a cache in fp8

    def attend(query: Tensor, copy: Tensor) -> Tensor:
        rows = copy[:, :, None]  # [pages, page, 1, R + E]
        attention(
            *(query, rows, rows[..., :R], o, lse, cache.block_table, cache.cache_seqlens),
            *(partial_results, splits, cache.scale, cache.page),
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )
        return o[:, None]

    return Attention(cache.copies, cache.slots, lambda *queries: _joined(*queries)[:, 0], attend)


def _torch(cache: LatentCache) -> Attention:
    """Eager PyTorch over a contiguous cache: no pages to gather, the softmax in fp32."""
    capacity = cache.block_table.shape[1] * cache.page
    position = torch.arange(capacity, device=cache.device)
    unused = (position >= cache.cache_seqlens[:, None])[:, None]  # [B, 1, S]
    mask = unused if bool(unused.any()) else None

    def attend(query: Tensor, copy: Tensor) -> Tensor:
        scores = query @ copy.mT * cache.scale  # [B, H, R + E] @ [B, R + E, S]
        if mask is not None:
            scores.masked_fill_(mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(cache.dtype)
        return (weights @ copy[..., : cache.R])[:, None]

    slots = torch.arange(len(cache.lengths), device=cache.device) * capacity + cache.position.long()
    return Attention(cache.contiguous, slots, lambda *queries: _joined(*queries)[:, 0], attend)


FORMS: dict[str, AttentionForm] = {
    "flashinfer_fa3": partial(_flashinfer, "fa3"),
    "flashinfer_fa2": partial(_flashinfer, "fa2"),
    "fa3": _fa3,
    "flash_mla": _flash_mla,
    "vllm_triton": _vllm_triton,
    "torch": _torch,
}


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """What a whole decode step of a layer gets beside the cache; nothing is rotated yet.

    Args:
        q_nope: [B, 1, H, nope]. q_rope: [B, 1, H, E]. kv_new: [B, 1, R + E].
        w_uk: [HK, nope, R]. w_uv: [HK, v, R].
        cos, sin: [B, 1, E].
    """

    cache: LatentCache
    q_nope: Tensor
    q_rope: Tensor
    kv_new: Tensor
    w_uk: Tensor
    w_uv: Tensor
    cos: Tensor
    sin: Tensor

    def double(self) -> "StepInputs":
        """The same in float64, over one copy of the cache."""
        cache = replace(self.cache, copies=(self.cache.copies[0].double(),))
        tensors = ("q_nope", "q_rope", "kv_new", "w_uk", "w_uv", "cos", "sin")
        wide: dict[str, Any] = {name: getattr(self, name).double() for name in tensors}
        return replace(self, cache=cache, **wide)


@dataclass(frozen=True)
class Step:
    """A whole decode step of a layer.

    Args:
        copies, slots: of the cache in its layout, as in Attention.
        call: what the clock sees: writes the new row to one of the copies and gives o [B, 1, H, v].
    """

    copies: tuple[Tensor, ...]
    slots: Tensor
    call: Callable[[Tensor], Tensor]


def eager_step(attention: Attention, inputs: StepInputs, copy: Tensor) -> Tensor:
    """A step in eager PyTorch around somebody's attention; gives [B, 1, H, v] and writes the new row to the copy."""
    i, R, width = inputs, inputs.cache.R, inputs.cache.R + inputs.cache.E
    groups = i.w_uk.shape[0], -1
    q_latent = torch.einsum("btgqn,gnr->btgqr", i.q_nope.unflatten(2, groups), i.w_uk).flatten(2, 3)
    q_rope = _rotate(i.q_rope, i.cos[:, :, None], i.sin[:, :, None])
    row = torch.cat([i.kv_new[..., :R], _rotate(i.kv_new[..., R:], i.cos, i.sin)], dim=-1)
    copy.flatten(0, 1)[:, :width].index_copy_(0, attention.slots, row[:, 0])
    o = attention.attend(attention.pack(q_latent, q_rope), copy)
    return torch.einsum("btgqr,gvr->btgqv", o.unflatten(2, groups), i.w_uv).flatten(2, 3)


def _rotate(u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = u.chunk(2, dim=-1)
    return u * cos + torch.cat([-second, first], dim=-1) * sin
