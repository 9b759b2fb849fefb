"""What a layer has beside its mixer, norms and MLP, as other libraries build it, on our parameters.

Called as the model's own are, so that they stand in their places.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import imported
from hylo.mixers.packing import autocast_dtype


class FlaNorm(nn.Module):
    """fla's RMS norm; with the sum before it where its block of Gated DeltaNet has that."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.compute = imported("fla.modules.layernorm", "rms_norm")

    def forward(self, x: Tensor, residual: Tensor | None = None, *, stream: bool = False) -> Any:
        n = self.norm
        if residual is not None:
            return self.compute(x, n.weight, None, residual=residual, eps=n.eps, prenorm=True)
        y = _cast_once(self.compute(x, n.weight, None, eps=n.eps))
        return (y, x) if stream else y


class FlaMlp(nn.Module):
    """fla's GatedMLP: activation and way out in one function, which makes the product anew in the backward."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp
        self.way_out = imported("fla.modules.activations", "swiglu_linear")

    def forward(self, x: Tensor) -> Any:
        return self.way_out(self.mlp.gate_proj(x), self.mlp.up_proj(x), self.mlp.down_proj.weight, None)


class MambaSsmNorm(nn.Module):
    """mamba-ssm's RMS norm as its block calls it: the stream in fp32, and always handed on by the norm."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.norm = norm
        self.compute = imported("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn")

    def forward(self, x: Tensor, residual: Tensor | None = None, *, stream: bool = False) -> Any:
        n = self.norm
        y, total = self.compute(
            *(x, n.weight, None),
            residual=residual,
            eps=n.eps,
            prenorm=True,
            residual_in_fp32=True,
            is_rms_norm=True,
        )
        y = _cast_once(y)
        return (y, total) if stream or residual is not None else y


class MambaSsmMlp(nn.Module):
    """mamba-ssm's GatedMLP: PyTorch's functions."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return self.mlp.down_proj(self.mlp.up_proj(x) * F.silu(self.mlp.gate_proj(x)))


def _cast_once(y: Tensor) -> Tensor:
    """A norm of theirs has its input's dtype, the stream's; else each projection would cast it for itself."""
    return y.to(autocast_dtype(y) or y.dtype)


# Norm and MLP of each library.
PIECES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], nn.Module]]] = {
    "fla": (FlaNorm, FlaMlp),
    "mamba_ssm": (MambaSsmNorm, MambaSsmMlp),
}
