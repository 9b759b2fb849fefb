"""SwiGLU in other libraries. They take gate and up as two tensors of their own, made outside the clock."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.forms import Form, Inputs, Run, leaf, plain_run
from bench.peers import imported

OUTPUTS = ("y",)


@dataclass(frozen=True, kw_only=True)
class GateUpInputs(Inputs):
    """What every contestant gets."""

    DIFFERENTIABLE = ("gate_up",)
    OF_TOKENS = ("gate_up",)

    gate_up: Tensor  # [1, T, 2 N]


def _apart(inputs: GateUpInputs, function: Callable[[Tensor, Tensor], Tensor]) -> Run:
    """Copies: a library may leave the gradients where its inputs were."""
    gate, up = (leaf(t.clone(), inputs) for t in inputs.gate_up.detach().chunk(2, dim=-1))
    return Run(
        forward=lambda: (function(gate, up),),
        leaves=(gate, up),
        output_gradients=inputs.output_gradients,
        outputs=lambda outputs: {"y": outputs[0]},
        gradients=lambda found: {"dgate_up": torch.cat(found, dim=-1)},
    )


def _torch(inputs: GateUpInputs) -> Run:
    """Eager PyTorch on both halves of one product."""

    def call() -> tuple[Tensor]:
        gate, up = inputs.gate_up.chunk(2, dim=-1)
        return (F.silu(gate) * up,)

    return plain_run(inputs, call, OUTPUTS)


def _torch_apart(inputs: GateUpInputs) -> Run:
    """Eager PyTorch on two products."""
    return _apart(inputs, lambda gate, up: F.silu(gate) * up)


def _fla(inputs: GateUpInputs) -> Run:
    return _apart(inputs, imported("fla.modules.activations", "swiglu"))


def _liger(inputs: GateUpInputs) -> Run:
    return _apart(inputs, imported("liger_kernel.transformers.functional", "liger_swiglu"))


FORMS: dict[str, Form] = {"torch": _torch, "torch_apart": _torch_apart, "fla": _fla, "liger": _liger}
