"""The Triton backend of absorbed latent attention: which inputs it takes, and its kernel, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of
from hylo_ops.mla_absorb import fp8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_R, _MAX_E = 576, 128


def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`mla_absorb` for inputs that `why_not` lets pass; never synchronises.

    A length beyond what the cache holds counts as what it holds.
    """
    from hylo_ops.mla_absorb import triton_decode

    with torch.cuda.device_of(inputs[0]):
        return triton_decode.forward(*inputs)


def why_not(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    **_: Any,
) -> str | None:
    """The reason why the kernel cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("q_nope", q_nope)) is not None:
        return reason
    for name, tensor in (("q_nope", q_nope), ("kv_cache", kv_cache), ("key_scale", key_scale)):
        is_fp8 = tensor is kv_cache and kv_cache.dtype == fp8.BYTES
        if tensor is not None and tensor.dtype not in _DTYPES and not is_fp8:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    for name, tensor in (("q_nope", q_nope), ("q_rope", q_rope), ("kv_cache", kv_cache)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dim of {name} is not contiguous: its strides are {tensor.stride()}"
    for name, tensor in (("cache_seqlens", cache_seqlens), ("cache_starts", cache_starts)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    if block_table is not None and block_table.stride(1) != 1 and block_table.shape[1] > 1:
        return f"the last dim of block_table is not contiguous: its strides are {block_table.stride()}"
    if kv_cache.dtype == fp8.BYTES and (reason := fp8.why_not_aligned(kv_cache)) is not None:
        return reason
    R, E = q_nope.shape[3], q_rope.shape[3]
    if R % 16 or not 0 < R <= _MAX_R:
        return f"R is {R}, not a multiple of 16 up to {_MAX_R}"
    if E % 16 or E > _MAX_E:
        return f"E is {E}, not a multiple of 16 up to {_MAX_E}"
    return None
