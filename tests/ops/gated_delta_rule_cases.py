"""Inputs for the fast backends of the gated delta rule: shapes of published models, gates fast, slow and hostile."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = [(64, 64), (64, 128), (128, 64), (128, 128), (256, 64), (256, 512)]
GATES = ("fast", "slow", "hostile")


def make(
    B: int,
    T: int,
    G: int,
    H: int,
    K: int,
    V: int,
    dtype: torch.dtype,
    gates: str,
    states: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The op's tensors in its order; `states` rows of initial state (B if None)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    g = F.logsigmoid(normal(B, T, H) + 3) * (0.01 if gates == "slow" else 1)
    if gates == "hostile":
        g[:, T // 3] = -torch.inf
        g[:, T // 2 : T // 2 + 3] = -100
        g[:, T // 5 : T // 5 + 9] = 0
    inputs = {
        "q": F.normalize(normal(B, T, G, K), dim=-1).to(dtype),
        "k": F.normalize(normal(B, T, G, K), dim=-1).to(dtype),
        "v": normal(B, T, H, V).to(dtype),
        "g": g,
        "beta": normal(B, T, H).sigmoid(),
        "initial_state": normal(states or B, H, K, V),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
