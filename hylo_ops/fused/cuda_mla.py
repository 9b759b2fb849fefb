"""The CUDA decode step of a layer of latent attention: what comes before the attention, itself, what comes behind it.

Three launches, each of which begins while the one ahead of it ends. What their kernels take is decided in
csrc/mla_step/launch.cpp and csrc/mla_absorb/launch.cpp.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.mla_absorb import cuda as attention

if TYPE_CHECKING:
    from hylo_ops._C import Kernel, MlaStep

KERNELS = ("mla_step_fwd_kernel_queries", "mla_step_fwd_kernel_values")


def forward(*inputs: Any, cubin_source: str | None = None) -> Tensor:
    """`fused.mla_step` for the inputs of its op; on the current stream, never synchronises.

    A position beyond what the cache holds is not written. The first call of a shape loads its kernels, which a CUDA
    graph cannot capture.

    Args:
        inputs: the op's, in its order, without the backend.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    *tensors, scale, key_scale = inputs
    o = _native(cubin_source).run(tuple(tensors), scale, key_scale)
    if isinstance(o, str):
        raise NotImplementedError(o)
    return o


@functools.cache
def direct() -> Callable[..., Tensor | str]:
    """A function of the op's inputs, one by one, that goes around torch's dispatcher.

    It answers with a reason where they need the dispatcher, are wrong or are not for this backend.
    """
    reason = cubin.why_not_native()
    return _native(None).direct if reason is None else lambda *_: reason


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
    """The reason why `forward` cannot take these inputs, or None."""
    if not q_nope.is_cuda:
        return f"q_nope is on {q_nope.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    tensors = (q_nope, q_rope, kv_new, w_uk, w_uv, kv_cache, cache_seqlens, position, cos, sin)
    return _native(None).why_not((*tensors, cache_starts, block_table), key_scale)


@functools.cache
def _native(source: str | None) -> "MlaStep":
    return cubin.native().MlaStep(torch, functools.partial(_load, source), attention._native(source))


def spec(dtype: str, nope: int, R: int) -> cubin.Spec:
    """Of both kernels for a type, by the build's name, and widths."""
    return cubin.Spec("mla_step", (("T", dtype), ("NOPE", nope), ("R", R)))


def _load(source: str | None, device: int, dtype: str, nope: int, R: int, values: bool) -> "Kernel | str":
    """One of the kernels of a kind, the one behind the attention or the other, or the reason why there is none."""
    kind = spec(dtype, nope, R)
    reason = cubin.why_not_device(device) or cubin.why_not(kind)
    return cubin.load(kind, KERNELS[values], device, source=source) if reason is None else reason
