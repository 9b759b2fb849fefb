"""The CUDA backend of absorbed latent attention: one call into `hylo_ops._C` checks, allocates and launches.

What its kernel takes is decided in one place, csrc/mla_absorb/launch.cpp. So is a call that skips torch's dispatcher
(`direct`): there each microsecond on the host counts.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.common.tickets import tickets

if TYPE_CHECKING:
    from hylo_ops._C import Kernel, MlaAbsorb

KERNEL = "mla_absorb_fwd_kernel_decode"


def forward(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    scale: float,
    causal: bool,
    fixed_split: bool,
    *,
    spread: tuple[int, int] | None = None,
    cubin_source: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's forward: one launch on the current stream, never synchronises.

    A length beyond what the cache holds counts as what it holds. The first call of a shape loads its kernel, which a
    CUDA graph cannot capture.

    Args:
        spread: thread blocks of a cluster (a power of two up to 16); and tiles of 64 tokens that each cluster takes at
            least, 0 for whole sequences. What suits the inputs if None.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    tensors = (q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale)
    results = _native(cubin_source).run(tensors, scale, causal, fixed_split, spread)
    if isinstance(results, str):
        raise NotImplementedError(results)
    return results


@functools.cache
def direct() -> Callable[..., Tensor | tuple[Tensor, Tensor] | str]:
    """A function of the op's inputs and of return_lse, one by one, that goes around torch's dispatcher.

    It gives o, or o and lse, and answers with a reason where they need the dispatcher, are wrong or are not for this
    backend.
    """
    reason = cubin.why_not_native()
    return _native(None).direct if reason is None else lambda *_: reason


def why_not(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    cache_seqlens: Tensor,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    key_scale: Tensor | None,
    fixed_split: bool = False,
    **_: object,
) -> str | None:
    """The reason why `forward` cannot take these inputs, or None."""
    if not q_nope.is_cuda:
        return f"q_nope is on {q_nope.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    tensors = (q_nope, q_rope, kv_cache, cache_seqlens, cache_starts, block_table, key_scale)
    return _native(None).why_not(tensors, fixed_split)


@functools.cache
def _native(source: str | None) -> "MlaAbsorb":
    return cubin.native().MlaAbsorb(torch, functools.partial(_load, source), _tickets, _capturing())


def _capturing() -> Callable[[], bool]:
    """Without torch's Python layer, where there is a GPU: it is asked in each call."""
    return getattr(torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing)


def _tickets(count: int, device: int) -> Tensor:
    return tickets(count, _device(device))


@functools.cache
def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def spec(dtype: str, R: int, E: int, N: int, scaled: bool, fp8: bool = False) -> cubin.Spec:
    """Of the kernel for a type, by the build's name, and widths; N query rows a tile, key scales behind the keys, rows
    of the cache in fp8."""
    dims = ("T", dtype), ("R", R), ("E", E), ("N", N), ("SCALED", int(scaled))
    return cubin.Spec("mla_absorb", (*dims, ("FP8", 1)) if fp8 else dims)


def _load(
    source: str | None,
    device: int,
    dtype: str,
    R: int,
    E: int,
    N: int,
    scaled: bool,
    fp8: bool,
    shared_bytes: int,
    max_cluster: int,
) -> "Kernel | str":
    """The kernel of a kind, or the reason why there is none."""
    kind = spec(dtype, R, E, N, scaled, fp8)
    reason = cubin.why_not_device(device) or cubin.why_not(kind)
    if reason is not None:
        return reason
    return cubin.load(kind, KERNEL, device, shared_bytes=shared_bytes, max_cluster=max_cluster, source=source)
