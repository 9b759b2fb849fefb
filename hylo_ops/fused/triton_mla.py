"""The Triton decode step of latent attention: which inputs it takes, and its kernels, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of
from hylo_ops.mla_absorb import triton as attention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_NOPE = 256  # a product has all of it at once


def forward(*inputs: Any) -> Tensor:
    """`fused.mla_step` for inputs that `why_not` lets pass; never synchronises.

    A position beyond what the cache holds is not written.
    """
    from hylo_ops.fused import triton_mla_step

    with torch.cuda.device_of(inputs[0]):
        return triton_mla_step.forward(*inputs)


def why_not(
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
) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("q_nope", q_nope)) is not None:
        return reason
    wide = {"q_nope": q_nope, "q_rope": q_rope, "kv_new": kv_new, "w_uk": w_uk, "w_uv": w_uv, "cos": cos, "sin": sin}
    for name, tensor in wide.items():
        if tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dim of {name} is not contiguous: its strides are {tensor.stride()}"
    for name, tensor in (("cache_seqlens", cache_seqlens), ("position", position)):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    if q_nope.shape[3] > _MAX_NOPE:
        return f"q_nope is {q_nope.shape[3]} wide, more than {_MAX_NOPE}"
    scales = key_scales(kv_cache, w_uk, q_rope, key_scale)
    latents = w_uk[None]  # as wide as the queries that the attention will get
    return attention.why_not(latents, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, scales)


def key_scales(kv_cache: Tensor, w_uk: Tensor, q_rope: Tensor, count: int | None) -> Tensor | None:
    """The view of the cache's columns right behind the rope."""
    width = w_uk.shape[2] + q_rope.shape[3]
    return None if count is None else kv_cache[..., width : width + count]
