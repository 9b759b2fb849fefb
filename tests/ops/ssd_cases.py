"""Inputs for the fast backends of ssd: heads of published models, gates fast, slow and hostile."""

from typing import Any

import torch
from torch import Tensor

HEADS = {"hylo": (8, 2, 2, 8), "mamba2": (4, 4, 1, 1), "grouped": (6, 6, 3, 2), "equal": (2, 2, 2, 2)}  # of dt, x, b, c
WIDTHS = [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256)]  # V, K
GATES = ("fast", "slow", "hostile")


def make(
    B: int,
    T: int,
    kind: str,
    V: int,
    K: int,
    dtype: torch.dtype,
    gates: str = "fast",
    states: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The op's tensors in its order; `states` rows of initial state (B if None). Wants `dt_softplus`.

    fast: a head forgets within about ten tokens, slow: within a thousand; hostile: fast, but some tokens
    empty the state and some neither decay nor write.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    H, x_heads, b_heads, c_heads = HEADS[kind]
    dt = normal(B, T, H)
    if gates == "hostile":
        dt[:, T // 3] = 40
        dt[:, T // 2 : T // 2 + 3] = 20
        dt[:, T // 5 : T // 5 + 9] = -1e4
    inputs = {
        "x": normal(B, T, x_heads, V).to(dtype),
        "dt": dt.to(dtype),
        "a": -torch.linspace(1, 16, H) * (0.01 if gates == "slow" else 1),
        "b": normal(B, T, b_heads, K).to(dtype),
        "c": normal(B, T, c_heads, K).to(dtype),
        "d": 1 + normal(H) / 4,
        "dt_bias": normal(H) - 4,
        "initial_state": normal(states or B, H, V, K),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}
