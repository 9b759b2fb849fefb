"""Products of few rows in other libraries: each a call that takes one of the weights' copies, and the residual."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class SkinnyInputs:
    """What every contestant gets; with `swiglu` the weights' first half is the gate's."""

    x: Tensor  # [B, K]
    weights: tuple[Tensor, ...]  # copies of one, [N, K] or [2 N, K]
    residual: Tensor | None  # [B, N]
    swiglu: bool

    def own_residual(self) -> Tensor | None:
        return None if self.residual is None else self.residual.clone()

    def double(self) -> "SkinnyInputs":
        residual = None if self.residual is None else self.residual.double()
        return replace(self, x=self.x.double(), weights=(self.weights[0].double(),), residual=residual)


Form = Callable[[SkinnyInputs], Product]


def _torch(inputs: SkinnyInputs) -> Product:
    """cuBLAS as PyTorch calls it; into the residual by addmm_, an activation eager on the product's halves."""

    def call(weight: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            return residual.addmm_(inputs.x, weight.T)
        y = F.linear(inputs.x, weight)
        if inputs.swiglu:
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up
        return y

    return call


FORMS: dict[str, Form] = {"torch": _torch}
