"""Gated RMS norm, forward: one row a case."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, peers
from bench.contest import Contestant, Roofs, Work
from bench.shapes import GATED_RMS_NORM, NormCase
from hylo_ops.testing import DTYPE_NAMES, within_budget

CASES = {case.name: case for case in GATED_RMS_NORM}
PEERS = peers.GATED_RMS_NORM
BACKENDS = ["cuda"]
EPS = 1e-5
SECONDS = 1.0
FLOP_PER_ELEMENT = 9  # square, sum; exp, add, divide, gate; scale, weight, and the product with the gate
# A peer further from float64 than this computes something else and is not compared.
MAX_PEER_ERROR = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def inputs(case: NormCase) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(case.dtype)

    x, gate = draw(case.B, case.T, case.H, case.V), draw(case.B, case.T, case.H, case.V)
    weight = draw(case.V) if case.norm_before_gate else draw(case.H, case.V)
    return x, gate, weight


def work(case: NormCase) -> Work:
    """Each input read once, the output written once."""
    elements = case.B * case.T * case.H * case.V
    weights = case.V if case.norm_before_gate else case.H * case.V
    return Work(bytes=(3 * elements + weights) * case.dtype.itemsize, flop=FLOP_PER_ELEMENT * elements)


def run(case: NormCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> list[dict[str, Any]]:
    """Correctness first, then the clocks.

    Raises:
        AssertionError: our result is outside the error budget.
    """
    tensors = inputs(case)
    ours, others = prepare(case, tensors, backends, chosen_peers)
    common = {
        "case": case.name,
        "shape": case.shape,
        "dtype": DTYPE_NAMES[case.dtype],
        "state_dtype": None,
        "gates": "norm_first" if case.norm_before_gate else "gate_first",
        "pass": "decode" if case.T == 1 else "forward",
    }
    return list(contest.rows(common, ours, others, work(case), roofs, seconds=SECONDS, host=True))


def prepare(
    case: NormCase, tensors: tuple[Tensor, Tensor, Tensor], backends: list[str], chosen_peers: list[str]
) -> tuple[contest.Side, contest.Side]:
    def norm(backend: str, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return hylo_ops.gated_rms_norm(
            x, gate, weight, eps=EPS, norm_before_gate=case.norm_before_gate, backend=backend
        )

    def contestant(call: Callable[[], peers.NormCall]) -> Contestant:
        return Contestant(check=lambda: {"y": call()()}, start=call)

    exact = {"y": norm("reference", *(t.double() for t in tensors))}
    eager = norm("reference", *tensors)

    def accept(results: contest.Results) -> None:
        within_budget(results["y"], eager, exact["y"], case.name)

    ours = {name: contestant(lambda name=name: partial(norm, name, *tensors)) for name in backends}
    others = {name: contestant(partial(PEERS[name], *tensors, EPS, case.norm_before_gate)) for name in chosen_peers}
    return (
        contest.prepare_ours(ours, exact, accept),
        contest.prepare_peers(others, exact, MAX_PEER_ERROR[case.dtype]),
    )
