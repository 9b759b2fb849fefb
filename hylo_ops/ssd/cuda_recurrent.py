"""The CUDA decode step of the SSD scan: one call into `hylo_ops._C` checks, allocates and launches.

What its kernels take is decided in one place, csrc/ssd/launch_step.cpp. So is a call that skips torch's dispatcher
(`direct`): there each microsecond on the host counts.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo_ops import cubin

if TYPE_CHECKING:
    from hylo_ops._C import Kernel, SsdStep

KERNEL = "ssd_fwd_kernel_step"


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
    *,
    cubin_source: str | None = None,
) -> Tensor:
    """The op's forward: one launch on the current stream, never synchronises.

    The first call of a shape loads its kernel, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    tensors = (x, dt, a, b, c, state, d, dt_bias, state_indices)
    o = _native(cubin_source).run(tensors, dt_softplus, dt_limit)
    if isinstance(o, str):
        raise NotImplementedError(o)
    return o


@functools.cache
def direct() -> Callable[..., Tensor | str]:
    """A function of the same inputs, one by one, that goes around torch's dispatcher.

    It answers with a reason where they need the dispatcher, are wrong or are not for this backend.
    """
    reason = cubin.why_not_native()
    return _native(None).direct if reason is None else lambda *_: reason


def why_not(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
) -> str | None:
    """The reason why `forward` cannot take these inputs, or None."""
    if not x.is_cuda:
        return f"x is on {x.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    return _native(None).why_not((x, dt, a, b, c, state, d, dt_bias, state_indices))


@functools.cache
def _native(source: str | None) -> "SsdStep":
    return cubin.native().SsdStep(torch, functools.partial(_load, source))


def spec(dtype: str, state: str, K: int, threads: int, rows: int) -> cubin.Spec:
    """Of the kernel for types, by the build's names, and a width; so many threads a block, rows a thread."""
    return cubin.Spec("ssd", (("T", dtype), ("S", state), ("K", K), ("TEAM", threads), ("ROWS", rows)), "step")


def _load(source: str | None, device: int, dtype: str, state: str, K: int, threads: int, rows: int) -> "Kernel | str":
    """The kernel of a kind, or the reason why there is none."""
    kind = spec(dtype, state, K, threads, rows)
    reason = cubin.why_not_device(device) or cubin.why_not(kind)
    return cubin.load(kind, KERNEL, device, source=source) if reason is None else reason
