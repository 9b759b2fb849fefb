"""Inputs that the forward's, the decode step's and the backward's tests share."""

import contextlib

import torch

from hylo_ops.ssd import reference, triton_chunk_fwd
from hylo_ops.ssd.triton_chunk_fwd import Config, PassConfig, Tiles

NAMES = ("x", "dt", "a", "b", "c", "d", "dt_bias")
TOKENWISE = ("x", "dt", "b", "c")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The interpreter takes its time for every program, whatever its size: chunks of two small blocks, wide tiles.
WIDE = Config(64, 64, 4, 1)
SMALL = Tiles(32, 16, 16, WIDE, PassConfig(512, 2, 4), WIDE, WIDE, WIDE, WIDE)


@contextlib.contextmanager
def tiled(tiles):
    """The kernels in these tiles."""
    before = triton_chunk_fwd.tiles_for
    triton_chunk_fwd.tiles_for = lambda *_: tiles
    yield
    triton_chunk_fwd.tiles_for = before


def make(B=2, T=65, H=2, heads=(1, 1, 2), V=16, K=16, dtype=torch.float32, state=True, seed=0):
    """The op's tensors by name; `heads` are those of x, b and c. Gates and vectors are float32, as models have them."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    x_heads, b_heads, c_heads = heads
    return {
        "x": normal(B, T, x_heads, V).to(dtype),
        "dt": normal(B, T, H).to(dtype),
        "a": -normal(H).exp().float(),
        "b": normal(B, T, b_heads, K).to(dtype),
        "c": normal(B, T, c_heads, K).to(dtype),
        "d": normal(H).float(),
        "dt_bias": normal(H).float(),
        "initial_state": normal(B, H, V, K).float() if state else None,
    }


def hostile_steps(inputs):
    """Steps that empty the state, alone and side by side, at a chunk's and a block's edges; steps of 0 and of 1e4.

    Takes three heads.
    """
    dt = inputs["dt"]
    inputs["a"][:] = torch.tensor([-1e3, -0.01, -2.0])
    dt[0, [0, 3, 15, 16, 31, 32, 36, 37], 0] = 1e4
    dt[0, 10:13, 1] = torch.tensor([1e4, 6e4, 30.0], dtype=dt.dtype)
    dt[0, 20:, 1] = -1e4
    dt[0, :, 2] = 0.5
    dt[0, 34:, 2] = 1e4
    return inputs


def steps(inputs, dt_softplus=True, dt_limit=None):
    """o and the final state token by token, in the working precision of the inputs' dtype."""
    return reference.step_by_step(**inputs, dt_softplus=dt_softplus, dt_limit=dt_limit)


def exact(inputs, **options):
    """The same in float64, on the inputs as they are rounded."""
    return steps({name: None if value is None else value.double() for name, value in inputs.items()}, **options)
