"""The gated RMS norm in other libraries."""

from dataclasses import dataclass

from torch import Tensor

from bench.forms import Form, Inputs, Run, Tensors, leaf, named_gradients, plain_run
from bench.peers import Missing, imported
from hylo_ops.gated_rms_norm import reference

OUTPUTS = ("y",)


@dataclass(frozen=True, kw_only=True)
class NormInputs(Inputs):
    """What every contestant of the norm gets; the gradient of y comes in in its dtype."""

    DIFFERENTIABLE = ("x", "gate", "weight")
    OF_TOKENS = ("x", "gate")

    x: Tensor  # [B, T, H, V]
    gate: Tensor
    weight: Tensor  # [V] or [H, V]
    eps: float
    norm_before_gate: bool


def _torch(inputs: NormInputs) -> Run:
    """Eager PyTorch with its own autograd."""
    i = inputs

    def forward() -> Tensors:
        return (reference.gated_rms_norm(i.x, i.gate, i.weight, i.eps, i.norm_before_gate),)

    return plain_run(inputs, forward, OUTPUTS)


def _fla(inputs: NormInputs) -> Run:
    rms_norm_gated = imported("fla.modules.fused_norm_gate", "rms_norm_gated")
    if not inputs.norm_before_gate:
        raise Missing("norms before the gate only")
    if inputs.weight.ndim != 1:
        raise Missing("takes one weight for all heads only")
    i = inputs
    return plain_run(inputs, lambda: (rms_norm_gated(i.x, i.gate, i.weight, None, eps=i.eps),), OUTPUTS)


def _mamba_ssm(inputs: NormInputs) -> Run:
    """Rows of one weight an element: the heads are their groups. A weight [V] makes rows of one head."""
    rmsnorm_fn = imported("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    rows = (-1, inputs.weight.numel())
    x, gate, weight = (leaf(t, inputs) for t in (inputs.x.view(rows), inputs.gate.view(rows), inputs.weight.flatten()))
    options = {"eps": inputs.eps, "group_size": inputs.x.shape[3], "norm_before_gate": inputs.norm_before_gate}
    shapes = {name: t.shape for name, t in inputs.differentiable().items()}
    return Run(
        forward=lambda: (rmsnorm_fn(x, weight, None, z=gate, **options),),
        leaves=(x, gate, weight),
        output_gradients=tuple(t.view(rows) for t in inputs.output_gradients),
        outputs=lambda outputs: {"y": outputs[0].view(inputs.x.shape)},
        gradients=lambda found: named_gradients(
            tuple(shapes), tuple(t.view(shape) for t, shape in zip(found, shapes.values(), strict=True))
        ),
    )


FORMS: dict[str, Form] = {"torch": _torch, "fla": _fla, "mamba_ssm": _mamba_ssm}
