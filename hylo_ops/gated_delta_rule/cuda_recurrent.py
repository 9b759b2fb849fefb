"""The CUDA decode step of the gated delta rule: one call into `hylo_ops._C` checks, allocates and launches.

What its kernels take is decided in one place, csrc/gated_delta_rule/launch.cpp. So is a call that skips torch's
dispatcher (`direct`): there each microsecond on the host counts.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.gated_delta_rule.activation import Activation

if TYPE_CHECKING:
    from hylo_ops._C import GatedDeltaRuleStep, Kernel

_KERNEL = "gated_delta_rule_fwd_kernel_step"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None,
    state_indices: Tensor | None,
    activation: Activation | None = None,
    settled_state: bool = False,
    *,
    cubin_source: str | None = None,
) -> Tensor:
    """The op's forward: one launch on the current stream, never synchronises.

    The first call of a shape loads its kernel, which a CUDA graph cannot capture.

    Args:
        settled_state: as the fused op has it.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    Raises:
        NotImplementedError: the inputs are not for this backend; the message says why.
    """
    native = _native(cubin_source)
    o = _run(native, q, k, v, g, beta, state, scale, state_indices, activation, settled_state, False)
    if isinstance(o, str):
        raise NotImplementedError(o)
    return o


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None,
    state_indices: Tensor | None,
    activation: Activation | None = None,
    settled_state: bool = False,
) -> Tensor | None:
    """The same without torch's dispatcher, or None: these arguments need it, are wrong or are not for this backend."""
    if (native := _native_or_none()) is None:
        return None
    o = _run(native, q, k, v, g, beta, state, scale, state_indices, activation, settled_state, True)
    return None if isinstance(o, str) else o


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None,
    state_indices: Tensor | None,
    activation: Activation | None = None,
    *_: object,
) -> str | None:
    """The reason why `forward` cannot take these inputs, or None."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if (reason := cubin.why_not_native()) is not None:
        return reason
    a_log, dt_bias = (None, None) if activation is None else activation[:2]
    return _native(None).why_not((q, k, v, g, beta, state, a_log, dt_bias, state_indices))


def _run(
    native: "GatedDeltaRuleStep",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float | None,
    state_indices: Tensor | None,
    activation: Activation | None,
    settled_state: bool,
    direct: bool,
) -> Tensor | str:
    a_log, dt_bias, norm, most_strength = activation or (None, None, False, 1.0)
    tensors = (q, k, v, g, beta, state, a_log, dt_bias, state_indices)
    return native.run(tensors, scale, norm, most_strength, settled_state, direct)


@functools.cache
def _native(source: str | None) -> "GatedDeltaRuleStep":
    return cubin.native().GatedDeltaRuleStep(torch, functools.partial(_load, source))


@functools.cache
def _native_or_none() -> "GatedDeltaRuleStep | None":
    return None if cubin.why_not_native() else _native(None)


def _load(source: str | None, device: int, dtype: str, state: str, K: int, raw: bool, team: int) -> "Kernel | str":
    """The kernel of types and width by the build's names, or the reason why there is none."""
    types = ("T", dtype), ("S", state)
    spec = cubin.Spec("gated_delta_rule", (*types, ("K", K), ("RAW", int(raw)), ("TEAM", team)), "step")
    reason = cubin.why_not_device(device) or cubin.why_not(spec)
    return cubin.load(spec, _KERNEL, device, source=source) if reason is None else reason
