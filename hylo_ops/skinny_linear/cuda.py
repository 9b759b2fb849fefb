"""The CUDA backend of products of few rows: one call into `hylo_ops._C` checks, allocates and launches.

What its kernel takes is decided in one place, csrc/skinny_linear/launch.cpp.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo_ops import cubin

if TYPE_CHECKING:
    from hylo_ops._C import Kernel, SkinnyLinear

KERNEL = "skinny_linear_fwd_kernel_y"


def forward(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    swiglu: bool,
    constant: bool,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    conv_weight: Tensor | None = None,
    conv_state: Tensor | None = None,
    silu: bool = False,
    spread: tuple[int, int, int] | None = None,
    cubin_source: str | None = None,
) -> Tensor:
    """The op's forward: one launch on the current stream, never synchronises.

    It begins while the kernel ahead of it ends. The first call of a type and number of rows loads its kernel, which a
    CUDA graph cannot capture.

    Args:
        residual: is added to in place, and given back.
        constant: no kernel that may still run writes `weight` or `norm`; they are read before it has ended.
        norm: [K]. Weights of an RMS norm that x goes through first, `eps` added to its mean square.
        conv_weight: [D, 4]. The first D outputs go through a causal convolution of a token, and through SiLU if `silu`.
        conv_state: [B, D, 4]. Their last inputs, updated in place.
        spread: thread blocks that share K, up to 8, with 128 columns for each at least: y depends on it in its last
            bits; tiles of 64 columns that a block fetches into the second cache while the kernel ahead still runs,
            beside those it has room for; and those it has yet to fetch when the next kernel may begin. What suits the
            inputs if None.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    matrices = _matrices(x, weight, residual)
    y = _native(cubin_source).run(*matrices, swiglu, constant, spread, norm, eps, conv_weight, conv_state, silu)
    if isinstance(y, str):
        raise NotImplementedError(y)
    return y.view(*x.shape[:-1], y.shape[-1])


def why_not(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    swiglu: bool,
    constant: bool = False,
    norm: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_state: Tensor | None = None,
) -> str | None:
    """The reason why `forward` cannot take these inputs, or None."""
    if not x.is_cuda:
        return f"x is on {x.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    if residual is not None and not residual.is_contiguous():
        return f"the residual is not contiguous: its strides are {residual.stride()}"
    return _native(None).why_not(*_matrices(x, weight, residual), swiglu, norm, conv_weight, conv_state)


def _matrices(x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.reshape(-1, x.shape[-1]), weight, None if residual is None else residual.view(-1, residual.shape[-1])


@functools.cache
def _native(source: str | None) -> "SkinnyLinear":
    return cubin.native().SkinnyLinear(torch, functools.partial(_load, source))


def spec(dtype: str, B: int, convolves: bool) -> cubin.Spec:
    """Of the kernel for a type, by the build's name, and up to so many rows: 16, 32 or 64."""
    return cubin.Spec("skinny_linear", (("T", dtype), ("B", B), ("CONV", int(convolves))))


def _load(
    source: str | None, device: int, dtype: str, B: int, convolves: bool, shared_bytes: int, max_cluster: int
) -> "Kernel | str":
    """The kernel of a kind, or the reason why there is none."""
    kind = spec(dtype, B, convolves)
    reason = cubin.why_not_device(device) or cubin.why_not(kind)
    if reason is not None:
        return reason
    return cubin.load(kind, KERNEL, device, shared_bytes=shared_bytes, max_cluster=max_cluster, source=source)
