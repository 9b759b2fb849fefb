"""Inputs that the forward's, the decode step's and the backward's tests share."""

import torch
import torch.nn.functional as F

from hylo_ops.gated_delta_rule import reference

NAMES = ("q", "k", "v", "g", "beta")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(B=2, T=65, G=1, H=2, K=16, V=16, dtype=torch.float32, state=True, seed=0):
    """q, k, v, g, beta by name, and an initial state for each row."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {
        "q": F.normalize(normal(B, T, G, K), dim=-1),
        "k": F.normalize(normal(B, T, G, K), dim=-1),
        "v": normal(B, T, H, V),
        "g": F.logsigmoid(normal(B, T, H) + 2),
        "beta": normal(B, T, H).sigmoid(),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    return inputs | {"initial_state": normal(B, H, K, V).float() if state else None}


def hostile_gates(inputs):
    """Resets, alone and side by side, at a chunk's first and last token; gates of -100 and of 0."""
    g = inputs["g"]
    g[0, [0, 3, 63, 64, 70, 71], 0] = -torch.inf
    g[0, 10:13, 1] = torch.tensor([-100.0, -torch.inf, -100.0], dtype=g.dtype)
    g[0, 20:, 1] = 0
    g[1, :, 0] = -100
    g[1, 66:, 1] = -torch.inf
    return inputs


def exact(inputs, scale):
    """o and the final state of the recurrence in float64, on the inputs as they are rounded."""
    return steps({name: None if value is None else value.double() for name, value in inputs.items()}, scale)


def steps(inputs, scale):
    """o and the final state of the recurrence, token by token, in the working precision of the inputs' dtype."""
    return reference.step_by_step(*(inputs[name] for name in NAMES), scale, inputs["initial_state"])
