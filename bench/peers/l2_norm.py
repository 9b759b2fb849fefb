"""Unit vectors in other libraries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.forms import Form, Inputs, Run, plain_run
from bench.peers import imported

OUTPUTS = ("y",)
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class HeadsInputs(Inputs):
    """What every contestant gets."""

    DIFFERENTIABLE = ("x",)
    OF_TOKENS = ("x",)

    x: Tensor  # [B, T, H, K], rows apart


def _torch(inputs: HeadsInputs) -> Run:
    """Eager PyTorch in fp32."""

    def call() -> tuple[Tensor]:
        wide = inputs.x.to(torch.promote_types(inputs.x.dtype, torch.float32))
        return ((wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)).to(inputs.x.dtype),)

    return plain_run(inputs, call, OUTPUTS)


def _fla(inputs: HeadsInputs) -> Run:
    """Copies a view whose rows are apart first."""
    l2norm = imported("fla.modules.l2norm", "l2norm")
    return plain_run(inputs, lambda: (l2norm(inputs.x, EPS),), OUTPUTS)


FORMS: dict[str, Form] = {"torch": _torch, "fla": _fla}
