"""The CUDA decode step of a whole Mamba2 block, from the projections to the norm: one launch.

As in `cuda_recurrent`, what its kernel takes is decided in csrc/ssd/launch_step.cpp.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hylo_ops import cubin

if TYPE_CHECKING:
    from hylo_ops._C import Kernel, Mamba2Step

KERNEL = "ssd_fwd_kernel_mamba2_step"


def forward(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    d_state: int,
    x_heads: int,
    b_heads: int,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
    eps: float,
    norm_before_gate: bool,
    settled_state: bool,
    *,
    cubin_source: str | None = None,
) -> Tensor:
    """`fused.mamba2_step` for the inputs of its op; one launch on the current stream, never synchronises.

    The first call of a shape loads its kernel, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    tensors = (z, xbc, dt, conv_weight, a, norm_weight, conv_state, state, conv_bias, d, dt_bias, state_indices)
    dims = (d_state, x_heads, b_heads)
    y = _native(cubin_source).run(tensors, dims, dt_softplus, dt_limit, eps, norm_before_gate, settled_state)
    if isinstance(y, str):
        raise NotImplementedError(y)
    return y


@functools.cache
def direct() -> Callable[..., Tensor | str]:
    """As `cuda_recurrent.direct`, of the inputs in the order that `hylo_ops._C` has them."""
    reason = cubin.why_not_native()
    return _native(None).direct if reason is None else lambda *_: reason


def why_not(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    d_state: int,
    x_heads: int,
    b_heads: int,
    **_: Any,
) -> str | None:
    """The reason why `forward` cannot take these inputs, or None."""
    if not z.is_cuda:
        return f"z is on {z.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    tensors = (z, xbc, dt, conv_weight, a, norm_weight, conv_state, state, conv_bias, d, dt_bias, state_indices)
    return _native(None).why_not(tensors, (d_state, x_heads, b_heads))


@functools.cache
def _native(source: str | None) -> "Mamba2Step":
    return cubin.native().Mamba2Step(torch, functools.partial(_load, source))


def spec(dtype: str, conv_state: str, weights: str, state: str, K: int, W: int, threads: int, rows: int) -> cubin.Spec:
    """Of the kernel for types, by the build's names, and widths; so many threads a block, rows a thread."""
    types = ("T", dtype), ("C", conv_state), ("P", weights), ("S", state)
    return cubin.Spec("ssd", (*types, ("K", K), ("W", W), ("TEAM", threads), ("ROWS", rows)), "mamba2_step")


def _load(source: str | None, device: int, *kind: Any) -> "Kernel | str":
    """The kernel of a kind, the arguments of `spec` and what `cubin.load` wants, or the reason why there is none."""
    *of_spec, shared_bytes, max_cluster = kind
    described = spec(*of_spec)
    reason = cubin.why_not_device(device) or cubin.why_not(described)
    if reason is not None:
        return reason
    return cubin.load(described, KERNEL, device, shared_bytes=shared_bytes, max_cluster=max_cluster, source=source)
