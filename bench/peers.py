"""The libraries we are compared with: each one's call for our inputs, or the reason why it is missing."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import hylo_ops


class Missing(Exception):
    """This peer cannot take part; the message says why."""


NormCall = Callable[[], Tensor]
# x, gate [B, T, H, V], weight [V] or [H, V], eps, norm_before_gate -> a call that gives y
NormPeer = Callable[[Tensor, Tensor, Tensor, float, bool], NormCall]


def _eager_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> NormCall:
    def call() -> Tensor:
        return hylo_ops.gated_rms_norm(x, gate, weight, eps=eps, norm_before_gate=norm_before_gate, backend="reference")

    return call


def _fla_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> NormCall:
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    if not norm_before_gate:
        raise Missing("norms before the gate only")
    if weight.ndim != 1:
        raise Missing("takes one weight for all heads only")
    return lambda: rms_norm_gated(x, gate, weight, None, eps=eps)


def _mamba_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> NormCall:
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


@dataclass(frozen=True)
class DeltaInputs:
    """What every contestant of the gated delta rule gets; each takes the form of gate and strength that it knows.

    g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b), exactly: libraries that apply them inside the kernel
    compute the same. a, b [B, T, H] are in the inputs' dtype, a_log, dt_bias [H] fp32.
    """

    q: Tensor  # [B, T, G, K]
    k: Tensor
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H] fp32
    beta: Tensor
    state: Tensor | None  # [B, H, K, V]
    output_gradients: tuple[Tensor, Tensor]  # of o, in its dtype, and of the final state, fp32
    a: Tensor
    b: Tensor
    a_log: Tensor
    dt_bias: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in ("q", "k", "v", "g", "beta", "state")}
        return {name: t for name, t in tensors.items() if t is not None}

    def leaves(self) -> "DeltaInputs":
        """The same memory, with gradients wanted of what has one."""
        wanted: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in self.differentiable().items()}
        return replace(self, **wanted)

    def double(self) -> "DeltaInputs":
        of_o, of_state = self.output_gradients
        wide: dict[str, Any] = {name: t.double() for name, t in self.differentiable().items()}
        return replace(self, **wide, output_gradients=(of_o.double(), of_state.double()))

    def first(self, tokens: int) -> "DeltaInputs":
        """The same up to so many tokens."""
        of_o, of_state = self.output_gradients
        cut = {name: getattr(self, name)[:, :tokens].contiguous() for name in ("q", "k", "v", "g", "beta", "a", "b")}
        return replace(self, **cut, output_gradients=(of_o[:, :tokens].contiguous(), of_state))

    def with_own_state(self) -> "DeltaInputs":
        """The same with a copy of the state, to be updated in place."""
        return replace(self, state=None if self.state is None else self.state.clone())


# gives o and the final state, [B, T, H, V] and [B, H, K, V]
DeltaCall = Callable[[], tuple[Tensor, Tensor]]
DeltaForm = Callable[[DeltaInputs], DeltaCall]


def _fla_chunk(x: DeltaInputs) -> DeltaCall:
    os.environ["FLA_FLASH_QLA"] = "0"  # else fla calls FlashQLA where it is installed
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    return lambda: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, output_final_state=True)


def _fla_decode(x: DeltaInputs) -> DeltaCall:
    try:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    assert x.state is not None
    if x.state.dtype != torch.float32:
        raise Missing("gives its new state in fp32 only")
    return lambda: fused_recurrent_gated_delta_rule(
        x.q, x.k, x.v, x.g, beta=x.beta, initial_state=x.state, output_final_state=True
    )


def _flash_qla_chunk(x: DeltaInputs) -> DeltaCall:
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        raise Missing("takes K = V = 128 only")
    try:
        from flash_qla import chunk_gated_delta_rule
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    return lambda: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, output_final_state=True)


def _flash_qla_decode(x: DeltaInputs) -> DeltaCall:
    raise Missing("has no single-token form")


def _flashinfer_forward(x: DeltaInputs) -> DeltaCall:
    """Packed sequences, linear gates, states [N, H, V, K]."""
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        raise Missing("its prefill takes K = V = 128 only")
    try:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    batch, length = x.v.shape[:2]
    q, k, v, alpha, beta = (t.flatten(0, 1).contiguous() for t in (x.q, x.k, x.v, x.g.exp(), x.beta))
    bounds = torch.arange(batch + 1, device=v.device, dtype=torch.int32) * length
    state = None if x.state is None else x.state.mT.contiguous()

    def call() -> tuple[Tensor, Tensor]:
        o, final_state = chunk_gated_delta_rule(
            *(q, k, v, alpha, beta),
            initial_state=state,
            output_final_state=True,
            cu_seqlens=bounds,
            max_seqlen=length,
        )
        return o.view(x.v.shape), final_state.mT

    return call


def _flashinfer_backward(x: DeltaInputs) -> DeltaCall:
    raise Missing("has no backward")


def _flashinfer_decode(x: DeltaInputs) -> DeltaCall:
    assert x.state is not None
    if x.state.dtype != torch.float32:
        raise Missing("takes an fp32 state only where K comes before V; flashinfer_v_first is the other layout")
    try:
        from flashinfer.gdn_decode import gated_delta_rule_decode
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    return lambda: gated_delta_rule_decode(*(x.q, x.k, x.v, x.state, x.a_log, x.a, x.dt_bias, x.b), use_qk_l2norm=False)


def _flashinfer_decode_v_first(x: DeltaInputs) -> DeltaCall:
    """The layout [B, H, V, K] that serving engines keep."""
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        # 0.7.2: more shared memory than a block has, then an illegal access that ends every later call of the process
        raise Missing("its kernel for this layout breaks at other widths than K = V = 128")
    try:
        from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    assert x.state is not None
    state = x.state.mT.contiguous()

    def call() -> tuple[Tensor, Tensor]:
        o, _ = gated_delta_rule_decode_pretranspose(
            *(x.q, x.k, x.v, state, x.a_log, x.a, x.dt_bias, x.b), use_qk_l2norm=False
        )
        return o, state.mT

    return call


GATED_DELTA_RULE: dict[str, dict[str, DeltaForm]] = {
    "forward": {"fla": _fla_chunk, "flash_qla": _flash_qla_chunk, "flashinfer": _flashinfer_forward},
    "backward": {"fla": _fla_chunk, "flash_qla": _flash_qla_chunk, "flashinfer": _flashinfer_backward},
    "decode": {
        "fla": _fla_decode,
        "flash_qla": _flash_qla_decode,
        "flashinfer": _flashinfer_decode,
        "flashinfer_v_first": _flashinfer_decode_v_first,
    },
}
