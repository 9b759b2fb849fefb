"""Inputs of a Mamba2 block for its tests, and the block from its definition, with nothing of ours in it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Heads of x, b and c of H = 4, and norms.
KINDS = {"hylo": (2, 2, 4, 4), "mamba2": (4, 1, 1, 1), "grouped": (4, 2, 2, 2), "full": (4, 4, 4, 1)}
H, V, K, W = 4, 6, 3, 4
EPS = 1e-5
LIMIT = (0.01, 1.5)


def make(kind: str, T: int, N: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Arguments of `mamba2_scan` for N sequences of T tokens, states included."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x_heads, b_heads, c_heads, norms = KINDS[kind]
    D = x_heads * V + (b_heads + c_heads) * K
    tensors = {
        "z": normal(N, T, H, V),
        "xbc": normal(N, T, D),
        "dt": normal(N, T, H),
        "conv_weight": normal(D, W),
        "conv_bias": normal(D),
        "a": -normal(H).exp(),
        "norm_weight": normal(norms, H * V // norms),
        "d": normal(H),
        "dt_bias": normal(H),
        "conv_state": normal(N, D, W),
        "initial_state": normal(N, H, V, K).to(dtype if dtype == torch.float64 else torch.float32),
    }
    return {**tensors, "d_state": K, "x_heads": x_heads, "b_heads": b_heads, "eps": EPS}


def plain(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    a: Tensor,
    norm_weight: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    initial_state: Tensor,
    d_state: int,
    x_heads: int,
    b_heads: int,
    eps: float,
    norm_before_gate: bool = False,
    dt_limit: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token; differentiable."""
    window, state, results = conv_state, initial_state, []
    for t in range(z.shape[1]):
        window = torch.cat([window[..., 1:], xbc[:, t, :, None]], dim=-1)
        mixed = F.silu((window * conv_weight).sum(-1) + conv_bias)
        x = mixed[:, : x_heads * V].view(-1, x_heads, V).repeat_interleave(H // x_heads, 1)
        rest = mixed[:, x_heads * V :].view(len(z), -1, d_state)
        b = rest[:, :b_heads].repeat_interleave(H // b_heads, 1)
        c = rest[:, b_heads:].repeat_interleave(H // (rest.shape[1] - b_heads), 1)
        steps = (dt[:, t] + dt_bias).exp().log1p().clamp(*(dt_limit or (None, torch.inf)))
        decay = (steps * a).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhv,bhk->bhvk", steps, x, b)
        o = torch.einsum("bhvk,bhk->bhv", state, c.to(state.dtype)).to(c.dtype) + d[:, None] * x
        gate = F.silu(z[:, t])
        grouped = (o if norm_before_gate else o * gate).reshape(len(z), *norm_weight.shape)
        y = grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight
        y = y.view_as(o)
        results.append(y * gate if norm_before_gate else y)
    return torch.stack(results, dim=1), window, state
