"""Inputs that the forward's, the backward's and the decode step's tests share."""

import contextlib
import itertools

import pytest
import torch

from hylo_ops.causal_conv1d import triton_bwd, triton_fwd
from hylo_ops.causal_conv1d.triton_fwd import Config

NAMES = ("x", "weight", "bias", "initial_state")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The interpreter takes its time for every step of a walk, whatever its width: tiles of four walks of 4 tokens.
SMALL = Config(channels=16, elements=2, length=4, ahead=2, stages=1, num_warps=1)


@contextlib.contextmanager
def cut(config=SMALL, edges=2):
    """The kernels with so many edge programs, and tiles of `config` however few there are."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_fwd, triton_bwd):
            patch.setattr(module, "CONFIG", config)
            patch.setattr(module, "MOST_EDGES", edges)
        patch.setattr(triton_fwd, "_PROGRAMS", 1)
        yield


def make(B=1, T=37, D=16, W=4, dtype=torch.float32, N=None, seed=0):
    """The op's tensors by name, all in one dtype; N states."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "initial_state": (N or B, D, W)}
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def packed(lengths, **sizes):
    """Inputs of sequences laid end to end, and their bounds."""
    inputs = make(B=1, T=sum(lengths), N=len(lengths), **sizes)
    return inputs, torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def alone(inputs, cu_seqlens):
    """The inputs of each packed sequence, as a batch of one."""
    for n, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        yield inputs | {"x": inputs["x"][:, begin:end], "initial_state": inputs["initial_state"][n : n + 1]}
