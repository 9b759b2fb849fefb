"""RMS norm, with and without a residual: forward alone, and forward and backward together."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import forms, passes
from bench.contest import Roofs, Work
from bench.forms import Run
from bench.peers import rms_norm as peers
from bench.peers.rms_norm import RowInputs, run_of
from bench.shapes import RMS_NORM, RowNormCase

CASES = {case.name: case for case in RMS_NORM}
PEERS = list(peers.FORMS)
BACKENDS = ["triton"]
EPS = 1e-5
SECONDS = 1.0
MAX_ERROR = 2e-2  # further from float64 than this is another function


def draw(case: RowNormCase, device: str = "cuda") -> RowInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    rows = 1, case.T, case.D
    residual = None if case.residual_dtype is None else normal(*rows, dtype=case.residual_dtype)
    gradients = [normal(*rows, dtype=case.dtype)]
    if case.residual_dtype is not None:
        gradients.append(normal(*rows, dtype=case.residual_dtype))
    return RowInputs(
        x=normal(*rows, dtype=case.x_dtype or case.dtype),
        residual=residual,
        weight=normal(case.D, dtype=torch.float32),
        eps=EPS,
        dtype=case.dtype,
        output_gradients=tuple(gradients),
    )


def work(case: RowNormCase, pass_: str) -> Work:
    """Each input read once, each output written once. Square and sum, scale, weight, and the residual's sum; backward
    the norm's projection and scale, and the sum into the weight's gradient."""
    x, y = (case.x_dtype or case.dtype).itemsize, case.dtype.itemsize
    residual = 0 if case.residual_dtype is None else case.residual_dtype.itemsize
    numbers, flop = x + y + 2 * residual, 5
    if pass_ == "forward_backward":
        numbers += y + (3 * residual + x if residual else 2 * x)  # dy, dtotal, total, dresidual, dx; or dy, x, dx
        flop += 12
    return Work(bytes=numbers * case.T * case.D, flop=flop * case.T * case.D)


def ours(backend: str, inputs: RowInputs) -> Run:
    i = inputs
    dtype = torch.float64 if i.x.dtype == torch.float64 else i.dtype  # of the exact result
    options = {"eps": i.eps, "dtype": dtype, "backend": backend}
    return run_of(inputs, lambda: hylo_ops.rms_norm(i.x, i.weight, residual=i.residual, **options))


FUNCTIONS = forms.Functions(ours, None, peers.FORMS, {}, step_names=(), limit=MAX_ERROR)


def run(case: RowNormCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    return passes.rows(case, FUNCTIONS, draw(case), work, backends, chosen_peers, roofs, SECONDS)
