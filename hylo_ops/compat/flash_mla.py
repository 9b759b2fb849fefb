"""Absorbed latent attention in the argument form of FlashMLA 1.0, and on latents and rope keys as two tensors.

from hylo_ops.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata
"""

import torch
from torch import Tensor

from hylo_ops import checks, fp8_row_bytes, mla_absorb

__all__ = ["FlashMLASchedMeta", "absorbed_attention", "flash_mla_with_kvcache", "get_mla_metadata"]

_FP8 = (torch.uint8, torch.float8_e4m3fn)
_NO_SPARSE = "each query attends to all cached tokens that it may see, none are picked"


class FlashMLASchedMeta:
    """Stands where FlashMLA keeps its schedule. It holds nothing: `mla_absorb` divides its work on the device."""


def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[FlashMLASchedMeta, None]:
    """Placeholders for `flash_mla_with_kvcache`; they stay valid when shapes or lengths change.

    Args:
        cache_seqlens: as num_q_tokens_per_head_k, num_heads_k, num_heads_q and is_fp8_kvcache of FlashMLA's earlier
            forms: ignored.
        topk: must be None.
    Returns:
        tile_scheduler_metadata: FlashMLASchedMeta.   num_splits: None.
    Raises:
        NotImplementedError: sparse attention is asked for.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), flash_mla/flash_mla_interface.py.
    """
    _refuse("topk", topk, _NO_SPARSE)
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: object,
    num_splits: object = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`hylo_ops.mla_absorb` over a paged cache, with latent and rope of the queries in one tensor.

    Dims: batch, seq_len_q, heads_q, head_dim (R + E), head_dim_v (R), num_blocks, page_block_size, max_blocks. FlashMLA
    takes R 512, R + E 576 or 512 and pages of 64 only; here they are what the op takes.
    Args:
        q: [batch, seq_len_q, heads_q, head_dim] bf16 | fp16 | fp32 | fp64. Latent | rope.
        k_cache: [num_blocks, page_block_size, 1, head_dim], dtype of q. Latent | rope. With is_fp8_kvcache
            [num_blocks, page_block_size, 1, bytes] uint8 | float8_e4m3fn: rows of `hylo_ops.quantize_kv_cache`, which
            at FlashMLA's dims are its 656 bytes.
        block_table: [batch, max_blocks] int32 | int64.
        cache_seqlens: [batch] int32 | int64. Tokens of each sequence in the cache, the seq_len_q new ones included.
        head_dim_v: the latent's width, 1 to head_dim.
        tile_scheduler_metadata: of `get_mla_metadata`, or anything else: ignored.
        num_splits: ignored.
        softmax_scale: head_dim ** -0.5 if None, the form's default. A model's is (nope + rope) ** -0.5 of its expanded
            head and has to be given.
        causal: new token t sees the first `cache_seqlens - seq_len_q + t + 1` positions, so the last one sees all.
        is_fp8_kvcache: whether the cache is in fp8; q is bf16 or fp16 then.
        indices: must be None, as attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length.
    Returns:
        out: [batch, seq_len_q, heads_q, head_dim_v], dtype of q. A token that sees nothing gets zeros.
        lse: [batch, heads_q, seq_len_q] fp32 (fp64 with fp64 inputs), natural log; +inf for a token that sees nothing,
            where `mla_absorb` has -inf.
    Raises:
        TypeError: an argument has a name that the form does not have.
        ValueError: a shape or dtype above is violated, or block_table or cache_seqlens is None.
        NotImplementedError: sparse attention, a sink or a second cache is asked for; as the op.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), flash_mla/flash_mla_interface.py.
    """
    _refuse("indices", indices, _NO_SPARSE)
    _refuse("attn_sink", attn_sink, "the softmax has no sink")
    _refuse("extra_k_cache", extra_k_cache, "there is one cache")
    _refuse("extra_indices_in_kvcache", extra_indices_in_kvcache, _NO_SPARSE)
    _refuse("topk_length", topk_length, _NO_SPARSE)
    _refuse("extra_topk_length", extra_topk_length, _NO_SPARSE)
    if block_table is None or cache_seqlens is None:
        name = "block_table" if block_table is None else "cache_seqlens"
        raise ValueError(f"{name} must be a tensor, got None")
    checks.shape("q", q, "batch", "seq_len_q", "heads_q", "head_dim")
    head_dim = q.shape[3]
    if not 0 < head_dim_v <= head_dim:
        raise ValueError(f"head_dim_v must be 1 to head_dim ({head_dim}), got {head_dim_v}")
    row = fp8_row_bytes(head_dim_v, head_dim - head_dim_v) if is_fp8_kvcache else head_dim
    checks.shape("k_cache", k_cache, "num_blocks", "page_block_size", 1, row)
    checks.dtype("k_cache", k_cache, _FP8 if is_fp8_kvcache else (q.dtype,))
    out, lse = mla_absorb(
        q[..., :head_dim_v],
        q[..., head_dim_v:],
        k_cache[:, :, 0],
        cache_seqlens=cache_seqlens,
        scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        block_table=block_table,
        causal=causal,
        return_lse=True,
    )
    inf = float("inf")
    return out, lse.transpose(1, 2).nan_to_num(
        nan=float("nan"), posinf=inf, neginf=inf
    )  # one kernel: only -inf changes


def absorbed_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    kv: Tensor,
    k_pe: Tensor,
    *,
    softmax_scale: float,
    cache_seqlens: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`hylo_ops.mla_absorb` over latents and rope keys that are two tensors, without pages.

    The op wants both in one row. Slices of one tensor, latent and rope side by side in it, are read where they lie,
    unless they want a gradient or a graph is compiled. Otherwise each call copies both next to each other: a cache that
    many calls read should have them so.

    Dims: batch, tokens (new ones), heads, R latent rank, E rope width, length cached tokens.
    Args:
        q_nope: [batch, tokens, heads, R] bf16 | fp16 | fp32 | fp64. Already multiplied by the key up-projection.
        q_pe: [batch, tokens, heads, E], dtype of q_nope. Rotated.
        kv: [batch, length, R]. Latents: keys and values of all heads.
        k_pe: [batch, length, E], dtype of kv. Rotated.
        softmax_scale: (nope + rope) ** -0.5 of the expanded head, not of R + E.
        cache_seqlens: [batch] int32 | int64. Tokens of each sequence, the new ones included; length if None.
        causal: new token t sees the first `cache_seqlens - tokens + t + 1` positions; without, all.
        return_lse: also return the log of the sum of exponentials.
    Returns:
        o: [batch, tokens, heads, R], dtype of q_nope, still to be multiplied by the value up-projection. A token that
            sees nothing gets zeros.
        lse: [batch, tokens, heads] fp32 (fp64 with fp64 inputs), natural log; -inf for a token that sees nothing.
    Raises:
        ValueError: a shape or dtype above is violated.
        NotImplementedError: as the op.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
    """
    checks.shape("q_nope", q_nope, "batch", "tokens", "heads", "R")
    batch, _, _, rank = q_nope.shape
    checks.shape("q_pe", q_pe, *q_nope.shape[:3], "E")
    checks.shape("kv", kv, batch, "length", rank)
    checks.shape("k_pe", k_pe, batch, kv.shape[1], q_pe.shape[3])
    checks.dtype("q_pe", q_pe, (q_nope.dtype,))
    checks.dtype("k_pe", k_pe, (kv.dtype,))
    checks.same_device("q_nope", q_nope, q_pe=q_pe, kv=kv, k_pe=k_pe, cache_seqlens=cache_seqlens)
    if cache_seqlens is None:
        cache_seqlens = torch.full((batch,), kv.shape[1], dtype=torch.int32, device=kv.device)
    rows = _one_tensor(kv, k_pe)
    return mla_absorb(
        q_nope, q_pe, rows, cache_seqlens=cache_seqlens, scale=softmax_scale, causal=causal, return_lse=return_lse
    )


def _refuse(name: str, value: object, reason: str) -> None:
    if value is not None:
        got = list(value.shape) if isinstance(value, Tensor) else value
        raise NotImplementedError(f"{name} is not supported: {reason}; got {got}")


def _one_tensor(kv: Tensor, k_pe: Tensor) -> Tensor:
    """[batch, length, R + E]: the tensor that both are slices of, or a copy."""
    if not _side_by_side(kv, k_pe):
        return torch.cat([kv, k_pe], dim=-1)
    return kv.as_strided((*kv.shape[:2], kv.shape[2] + k_pe.shape[2]), kv.stride())


def _side_by_side(kv: Tensor, k_pe: Tensor) -> bool:
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (kv.requires_grad or k_pe.requires_grad)):
        return False
    begin = k_pe.storage_offset() - kv.shape[2]
    if begin < 0 or 0 in k_pe.shape or kv.stride(2) != 1:
        return False
    return k_pe.as_strided(kv.shape, k_pe.stride(), begin).is_set_to(kv)  # what lies before k_pe is kv
