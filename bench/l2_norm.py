"""Unit vectors, of heads within a wider projection: forward alone, and forward and backward together."""

from collections.abc import Iterator
from typing import Any

import torch

import hylo_ops
from bench import forms, passes
from bench.contest import Roofs, Work
from bench.forms import Run
from bench.peers import l2_norm as peers
from bench.peers.l2_norm import EPS, OUTPUTS, HeadsInputs
from bench.shapes import L2_NORM, HeadsCase

CASES = {case.name: case for case in L2_NORM}
PEERS = list(peers.FORMS)
BACKENDS = ["triton"]
SECONDS = 1.0
MAX_ERROR = 2e-2  # further from float64 than this is another function
# Numbers that move: x, y; then x, dy, dx. Square, sum, scale; product, sum, projection, scale.
MOVED = {"forward": 2, "forward_backward": 2 + 3}
FLOP = {"forward": 3, "forward_backward": 3 + 6}


def draw(case: HeadsCase, device: str = "cuda") -> HeadsInputs:
    """Keys that lie behind as many queries, and before values."""
    generator = torch.Generator(device=device).manual_seed(0)
    channels = torch.randn((case.B, case.T, case.channels), generator=generator, device=device).to(case.dtype)
    width = case.H * case.K
    gradient = torch.randn((case.B, case.T, case.H, case.K), generator=generator, device=device).to(case.dtype)
    x = channels[..., width : 2 * width].unflatten(-1, (case.H, case.K))
    return HeadsInputs(x=x, output_gradients=(gradient,))


def work(case: HeadsCase, pass_: str) -> Work:
    elements = case.B * case.T * case.H * case.K
    return Work(bytes=MOVED[pass_] * elements * case.dtype.itemsize, flop=FLOP[pass_] * elements)


def ours(backend: str, inputs: HeadsInputs) -> Run:
    return forms.plain_run(inputs, lambda: (hylo_ops.l2_norm(inputs.x, eps=EPS, backend=backend),), OUTPUTS)


FUNCTIONS = forms.Functions(ours, None, peers.FORMS, {}, step_names=(), limit=MAX_ERROR)


def run(case: HeadsCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    return passes.rows(case, FUNCTIONS, draw(case), work, backends, chosen_peers, roofs, SECONDS)
