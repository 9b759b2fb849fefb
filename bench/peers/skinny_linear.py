"""Products of few rows in other libraries: each a call that takes one of the weights' copies, and what is updated."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor | None], Tensor]
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class SkinnyInputs:
    """What every contestant gets; with `swiglu` the weights' first half is the gate's."""

    x: Tensor  # [B, K]
    weights: tuple[Tensor, ...]  # copies of one, [N, K] or [2 N, K]
    updated: Tensor | None  # what it is added to [B, N], or the last inputs of the convolution [B, D, 4]
    swiglu: bool
    norm: Tensor | None = None  # [K]
    conv: Tensor | None = None  # [D, 4]

    def own(self) -> Tensor | None:
        """Of what is updated, a copy."""
        return None if self.updated is None else self.updated.clone()

    def double(self) -> "SkinnyInputs":
        others = {name: getattr(self, name) for name in ("updated", "norm", "conv")}
        wide = {name: None if tensor is None else tensor.double() for name, tensor in others.items()}
        return replace(self, x=self.x.double(), weights=(self.weights[0].double(),), **wide)


Form = Callable[[SkinnyInputs], Product]


def _torch(inputs: SkinnyInputs) -> Product:
    """cuBLAS as PyTorch calls it; into the residual by addmm_, all that comes before and behind it eager."""

    def call(weight: Tensor, updated: Tensor | None) -> Tensor:
        x = inputs.x
        if updated is not None and inputs.conv is None:
            return updated.addmm_(x, weight.T)
        if inputs.norm is not None:
            x = F.rms_norm(x, inputs.norm.shape, inputs.norm, EPS)
        y = F.linear(x, weight)
        if inputs.swiglu:
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up
        if updated is not None and inputs.conv is not None:
            first = y[:, : len(inputs.conv)]
            updated.copy_(torch.cat([updated[..., 1:], first[..., None]], dim=-1))
            first.copy_(F.silu((updated * inputs.conv).sum(-1)))
        return y

    return call


FORMS: dict[str, Form] = {"torch": _torch}
