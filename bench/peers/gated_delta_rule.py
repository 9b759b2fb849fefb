"""The gated delta rule in other libraries."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.forms import Inputs
from bench.peers import Missing, imported


@dataclass(frozen=True, kw_only=True)
class DeltaInputs(Inputs):
    """What every contestant of the gated delta rule gets; each takes the form of gate and strength that it knows.

    g = -exp(a_log) softplus(a + dt_bias) and beta = sigmoid(b), exactly: libraries that apply them inside the kernel
    compute the same. a, b [B, T, H] are in the inputs' dtype, a_log, dt_bias [H] fp32. Gradients come in of o, in its
    dtype, and of the final state, fp32.
    """

    DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "state")
    OF_TOKENS = ("q", "k", "v", "g", "beta", "a", "b")
    STATES = ("state",)

    q: Tensor  # [B, T, G, K]
    k: Tensor
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H] fp32
    beta: Tensor
    state: Tensor | None  # [B, H, K, V]
    a: Tensor
    b: Tensor
    a_log: Tensor
    dt_bias: Tensor


# gives o and the final state, [B, T, H, V] and [B, H, K, V]
DeltaCall = Callable[[], tuple[Tensor, Tensor]]
DeltaForm = Callable[[DeltaInputs], DeltaCall]


def _fla_chunk(x: DeltaInputs) -> DeltaCall:
    os.environ["FLA_FLASH_QLA"] = "0"  # else fla calls FlashQLA where it is installed
    chunk_gated_delta_rule = imported("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    return lambda: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, output_final_state=True)


def _fla_decode(x: DeltaInputs) -> DeltaCall:
    fused_recurrent_gated_delta_rule = imported("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
    assert x.state is not None
    if x.state.dtype != torch.float32:
        raise Missing("gives its new state in fp32 only")
    return lambda: fused_recurrent_gated_delta_rule(
        x.q, x.k, x.v, x.g, beta=x.beta, initial_state=x.state, output_final_state=True
    )


def _flash_qla_chunk(x: DeltaInputs) -> DeltaCall:
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        raise Missing("takes K = V = 128 only")
    chunk_gated_delta_rule = imported("flash_qla", "chunk_gated_delta_rule")
    return lambda: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, output_final_state=True)


def _flash_qla_decode(x: DeltaInputs) -> DeltaCall:
    raise Missing("has no single-token form")


def _flashinfer_forward(x: DeltaInputs) -> DeltaCall:
    """Packed sequences, linear gates, states [N, H, V, K]."""
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        raise Missing("its prefill takes K = V = 128 only")
    chunk_gated_delta_rule = imported("flashinfer.gdn_prefill", "chunk_gated_delta_rule")
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
    gated_delta_rule_decode = imported("flashinfer.gdn_decode", "gated_delta_rule_decode")
    return lambda: gated_delta_rule_decode(*(x.q, x.k, x.v, x.state, x.a_log, x.a, x.dt_bias, x.b), use_qk_l2norm=False)


def _flashinfer_decode_v_first(x: DeltaInputs) -> DeltaCall:
    """The layout [B, H, V, K] that serving engines keep."""
    if (x.q.shape[3], x.v.shape[3]) != (128, 128):
        # 0.7.2: more shared memory than a block has, then an illegal access that ends every later call of the process
        raise Missing("its kernel for this layout breaks at other widths than K = V = 128")
    gated_delta_rule_decode_pretranspose = imported("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose")
    assert x.state is not None
    state = x.state.mT.contiguous()

    def call() -> tuple[Tensor, Tensor]:
        o, _ = gated_delta_rule_decode_pretranspose(
            *(x.q, x.k, x.v, state, x.a_log, x.a, x.dt_bias, x.b), use_qk_l2norm=False
        )
        return o, state.mT

    return call


FORMS: dict[str, dict[str, DeltaForm]] = {
    "forward": {"fla": _fla_chunk, "flash_qla": _flash_qla_chunk, "flashinfer": _flashinfer_forward},
    "backward": {"fla": _fla_chunk, "flash_qla": _flash_qla_chunk, "flashinfer": _flashinfer_backward},
    "decode": {
        "fla": _fla_decode,
        "flash_qla": _flash_qla_decode,
        "flashinfer": _flashinfer_decode,
        "flashinfer_v_first": _flashinfer_decode_v_first,
    },
}
