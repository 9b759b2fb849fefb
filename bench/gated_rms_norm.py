"""Gated RMS norm: forward alone, and forward and backward together."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, forms
from bench.contest import Results, Roofs, Work
from bench.forms import Run, Tensors
from bench.peers import gated_rms_norm as peers
from bench.peers.gated_rms_norm import OUTPUTS, NormInputs
from bench.shapes import GATED_RMS_NORM, NormCase
from hylo_ops.testing import DTYPE_NAMES, within_budget

CASES = {case.name: case for case in GATED_RMS_NORM}
PEERS = peers.FORMS
BACKENDS = ["cuda", "triton"]
EPS = 1e-5
SECONDS = 1.0
# Forward: square, sum; exp, add, divide, gate; scale, weight, and the product with the gate. Backward: these again, the
# norm's projection and scale, the product rule of the gate and of silu, and the sum into the weight's gradient.
FLOP_PER_ELEMENT = {"forward": 9, "forward_backward": 9 + 25}
# Numbers of an element that move: x, gate, y; then x, gate and the gradients of all three.
MOVED_PER_ELEMENT = {"forward": 3, "forward_backward": 3 + 5}
# A peer further from float64 than this computes something else and is not compared.
MAX_PEER_ERROR = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def draw(case: NormCase, device: str = "cuda") -> NormInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    elements = case.B, case.T, case.H, case.V
    return NormInputs(
        x=normal(*elements),
        gate=normal(*elements),
        weight=normal(case.V) if case.norm_before_gate else normal(case.H, case.V),
        eps=EPS,
        norm_before_gate=case.norm_before_gate,
        output_gradients=(normal(*elements),),
    )


def work(case: NormCase, pass_: str) -> Work:
    """Each input read once, each output written once; a decode step is a forward."""
    counted = "forward" if pass_ == "decode" else pass_
    elements = case.B * case.T * case.H * case.V
    weights = case.V if case.norm_before_gate else case.H * case.V
    weights *= 3 if counted == "forward_backward" else 1  # read twice, and its gradient
    return Work(
        bytes=(MOVED_PER_ELEMENT[counted] * elements + weights) * case.dtype.itemsize,
        flop=FLOP_PER_ELEMENT[counted] * elements,
    )


def our_norm(backend: str, inputs: NormInputs) -> Run:
    i = inputs

    def forward() -> Tensors:
        y = hylo_ops.gated_rms_norm(
            i.x, i.gate, i.weight, eps=i.eps, norm_before_gate=i.norm_before_gate, backend=backend
        )
        return (y,)

    return forms.plain_run(inputs, forward, OUTPUTS)


def run(case: NormCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> list[dict[str, Any]]:
    """Correctness first, then the clocks.

    Raises:
        AssertionError: our result is outside the error budget.
    """
    inputs = draw(case)
    exact = forms.exact_results(partial(our_norm, "reference"), inputs)
    rows: list[dict[str, Any]] = []
    for pass_ in case.passes:
        computed = "forward" if pass_ == "decode" else pass_  # it has no state
        ours, others = prepare(case, computed, inputs, exact[computed], backends, chosen_peers)
        common = {
            "case": case.name,
            "shape": case.shape,
            "dtype": DTYPE_NAMES[case.dtype],
            "state_dtype": None,
            "gates": "norm_first" if case.norm_before_gate else "gate_first",
            "pass": pass_,
        }
        host = pass_ != "forward_backward"
        rows += contest.rows(common, ours, others, work(case, pass_), roofs, seconds=SECONDS, host=host)
    return rows


def prepare(
    case: NormCase, pass_: str, inputs: NormInputs, exact: Results, backends: list[str], chosen_peers: list[str]
) -> tuple[contest.Side, contest.Side]:
    sides = {name: partial(our_norm, name) for name in backends}, {name: PEERS[name] for name in chosen_peers}
    ours, others = (forms.contestants(pass_, side, inputs, inputs, ()) for side in sides)
    accept = within_eager(inputs, exact, pass_, case.name)
    return (
        contest.prepare_ours(ours, exact, accept),
        contest.prepare_peers(others, exact, MAX_PEER_ERROR[case.dtype]),
    )


def within_eager(inputs: NormInputs, exact: Results, pass_: str, what: str) -> Callable[[Results], None]:
    """Raises AssertionError where a result is further from the exact one than eager PyTorch's error budget allows."""
    eager = forms.contestants(pass_, {"torch": partial(our_norm, "reference")}, inputs, inputs, ())["torch"].check()

    def accept(results: Results) -> None:
        for name, result in results.items():
            within_budget(result, eager[name], exact[name], f"{what}, {pass_}, {name}")

    return accept
