"""The RMS norm in other libraries, with the sum and the cast that a model does around it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.forms import Form, Inputs, Run, Tensors, plain_run
from bench.peers import imported

OUTPUTS = ("y", "total")


@dataclass(frozen=True, kw_only=True)
class RowInputs(Inputs):
    """What every contestant gets; gradients come in for y and, with a residual, for the total."""

    DIFFERENTIABLE = ("x", "residual", "weight")
    OF_TOKENS = ("x", "residual")

    x: Tensor  # [1, T, D]
    residual: Tensor | None
    weight: Tensor  # [D]
    eps: float
    dtype: torch.dtype  # of y


def run_of(inputs: RowInputs, call: Callable[[], Any]) -> Run:
    """Of a call that gives y, or y and the total."""
    names = OUTPUTS if inputs.residual is not None else OUTPUTS[:1]

    def forward() -> Tensors:
        outputs = call()
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return plain_run(inputs, forward, names)


def _torch(inputs: RowInputs) -> Run:
    """Eager PyTorch: its own norm, a sum before it and a cast behind it."""
    i = inputs

    def call() -> Tensor | Tensors:
        total = i.x if i.residual is None else i.residual + i.x
        y = F.rms_norm(total, (total.shape[-1],), i.weight.to(total.dtype), i.eps).to(i.dtype)
        return y if i.residual is None else (y, total)

    return run_of(inputs, call)


def _fla(inputs: RowInputs) -> Run:
    rms_norm = imported("fla.modules.layernorm", "rms_norm")
    i = inputs

    def call() -> Tensor | Tensors:
        if i.residual is None:
            y: Tensor = rms_norm(i.x, i.weight, None, eps=i.eps)
            return y.to(i.dtype)
        y, total = rms_norm(i.x, i.weight, None, residual=i.residual, eps=i.eps, prenorm=True, residual_in_fp32=True)
        return y.to(i.dtype), total

    return run_of(inputs, call)


def _liger(inputs: RowInputs) -> Run:
    """Not in place: the gradients that come in are everybody's."""
    i = inputs
    options: dict[str, Any] = {"offset": 0.0, "casting_mode": "llama", "in_place": False}
    if i.residual is None:
        norm = imported("liger_kernel.transformers.functional", "liger_rms_norm")
        return run_of(inputs, lambda: norm(i.x, i.weight, i.eps, **options).to(i.dtype))
    added = imported("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")

    def call() -> Tensors:
        y, total = added(i.x, i.residual, i.weight, i.eps, **options)
        return y.to(i.dtype), total

    return run_of(inputs, call)


FORMS: dict[str, Form] = {"torch": _torch, "fla": _fla, "liger": _liger}
