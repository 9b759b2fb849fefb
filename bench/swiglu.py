"""SwiGLU: forward alone, and forward and backward together."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import forms, passes
from bench.contest import Roofs, Work
from bench.forms import Run
from bench.peers import swiglu as peers
from bench.peers.swiglu import OUTPUTS, GateUpInputs
from bench.shapes import SWIGLU, GateUpCase

CASES = {case.name: case for case in SWIGLU}
PEERS = list(peers.FORMS)
BACKENDS = ["triton"]
SECONDS = 1.0
MAX_ERROR = 2e-2  # further from float64 than this is another function
# Numbers that move for one of y: gate, up, y; then gate, up, dy and both gradients. FLOP: exp, add, divide, product;
# these again, silu's slope and three products.
MOVED = {"forward": 3, "forward_backward": 3 + 5}
FLOP = {"forward": 5, "forward_backward": 5 + 11}


def draw(case: GateUpCase, device: str = "cuda") -> GateUpInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(width: int) -> Tensor:
        return torch.randn((1, case.T, width), generator=generator, device=device).to(case.dtype)

    return GateUpInputs(gate_up=normal(2 * case.N), output_gradients=(normal(case.N),))


def work(case: GateUpCase, pass_: str) -> Work:
    elements = case.T * case.N
    return Work(bytes=MOVED[pass_] * elements * case.dtype.itemsize, flop=FLOP[pass_] * elements)


def ours(backend: str, inputs: GateUpInputs) -> Run:
    return forms.plain_run(inputs, lambda: (hylo_ops.swiglu(inputs.gate_up, backend=backend),), OUTPUTS)


FUNCTIONS = forms.Functions(ours, None, peers.FORMS, {}, step_names=(), limit=MAX_ERROR)


def run(case: GateUpCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    return passes.rows(case, FUNCTIONS, draw(case), work, backends, chosen_peers, roofs, SECONDS)
