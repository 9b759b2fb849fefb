"""The libraries we are compared with: each one's call for our inputs, or the reason why it is missing."""

from collections.abc import Callable

from torch import Tensor

import hylo_ops

# x, gate [B, T, H, V], weight [V] or [H, V], eps, norm_before_gate -> a call without arguments that gives y
NormPeer = Callable[[Tensor, Tensor, Tensor, float, bool], Callable[[], Tensor]]


class Missing(Exception):
    """This peer cannot take part; the message says why."""


def _eager_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Callable[[], Tensor]:
    def call() -> Tensor:
        return hylo_ops.gated_rms_norm(x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, backend="reference")

    return call


def _fla_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Callable[[], Tensor]:
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    if not norm_before_gate:
        raise Missing("norms before the gate only")
    if weight.ndim != 1:
        raise Missing("takes one weight for all heads only")
    return lambda: rms_norm_gated(x, gate, weight, None, eps=eps)


def _mamba_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Callable[[], Tensor]:
    try:
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    width = x.shape[3]
    rows = (-1, weight.numel())  # one weight an element: the heads are its groups
    flat_x, flat_gate, flat_weight = x.reshape(rows), gate.reshape(rows), weight.flatten()
    return lambda: rmsnorm_fn(
        flat_x, flat_weight, None, z=flat_gate, eps=eps, group_size=width, norm_before_gate=norm_before_gate
    ).view(x.shape)


GATED_RMS_NORM: dict[str, NormPeer] = {"torch": _eager_norm, "fla": _fla_norm, "mamba_ssm": _mamba_norm}
