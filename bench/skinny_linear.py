"""Products of a decode step: few rows of x with weights that no cache of the GPU holds when their turn comes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, timing
from bench.contest import Contestant, Results, Roofs, Work
from bench.peers import skinny_linear as peers
from bench.peers.skinny_linear import Form, Product, SkinnyInputs
from bench.shapes import SKINNY_LINEAR, SkinnyCase
from bench.timing import Call, Rotation

CASES = {case.name: case for case in SKINNY_LINEAR}
PEERS = list(peers.FORMS)
BACKENDS = ["cuda", "triton", "composed"]  # the last one of a step, which Triton has no kernel of
SECONDS = 0.4  # of the clocks, a row
MAX_ERROR = 2e-2  # further from float64 than this is another function
COLD_BYTES = 256 << 20  # of copies of the weights, that calls take in turn; an H200's L2 has 50 MB


def ceilings() -> dict[str, float]:
    """For the result file, beside the roofs that every stem has."""
    return {"read_bytes_per_second": timing.read_bandwidth()}


def draw(case: SkinnyCase, device: str = "cuda") -> SkinnyInputs:
    """Weights whose products are of size 1."""
    generator, D = torch.Generator(device=device).manual_seed(0), case.channels

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    first = normal(case.rows, case.K) * case.K**-0.5
    return SkinnyInputs(
        x=normal(case.B, case.K),
        weights=timing.cold_copies(first, COLD_BYTES),
        updated=normal(case.B, case.N) if case.kind == "add" else normal(case.B, D, 4) if D else None,
        swiglu="swiglu" in case.kind,
        norm=normal(case.K) if case.has_norm else None,
        conv=normal(D, 4) if D else None,
    )


def work(case: SkinnyCase) -> Work:
    """Weights and x read once, y written once; a residual is read, and inputs of a convolution there and back.

    A multiply and an add are 2 FLOP, of the product alone.
    """
    of_row = case.K + case.N * (2 if case.kind == "add" else 1) + 2 * 4 * case.channels
    numbers = case.rows * case.K + case.B * of_row + (case.K if case.has_norm else 0) + 4 * case.channels
    return Work(bytes=case.dtype.itemsize * numbers, flop=2 * case.B * case.rows * case.K)


def ours(backend: str, inputs: SkinnyInputs) -> Product:
    """As the engine calls it: nothing writes the weights."""
    options: dict[str, Any] = {"constant_weight": True, "backend": backend}

    def call(weight: Tensor, updated: Tensor | None) -> Tensor:
        if updated is not None:
            return hylo_ops.skinny_linear_add_(updated, inputs.x, weight, **options)
        return hylo_ops.skinny_linear(inputs.x, weight, swiglu=inputs.swiglu, **options)

    return call if inputs.norm is None else partial(_step, inputs, options)


def _step(inputs: SkinnyInputs, options: dict[str, Any], weight: Tensor, updated: Tensor | None) -> Tensor:
    conv = {} if inputs.conv is None else {"conv_weight": inputs.conv, "conv_state": updated, "activation": "silu"}
    of_norm = {"norm_weight": inputs.norm, "eps": peers.EPS}
    x = inputs.x[:, None]
    return hylo_ops.fused.linear_step(x, weight, swiglu=inputs.swiglu, **of_norm, **conv, **options)[:, 0]


def contestant(form: Form, inputs: SkinnyInputs) -> Contestant:
    """On a residual or states of its own, which change while the clocks run."""

    def check() -> Results:
        return {"y": form(inputs)(inputs.weights[0], inputs.own())}

    def start() -> Call:
        call, updated = form(inputs), inputs.own()
        return Rotation([partial(call, weight, updated) for weight in inputs.weights])

    return Contestant(check=check, start=start)


def run(case: SkinnyCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """One row for each backend; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    inputs = draw(case)
    backends = [name for name in backends if name != ("triton" if case.has_norm else "composed")]
    exact = contestant(partial(ours, "reference"), inputs.double()).check()
    able = {name: contestant(partial(ours, name), inputs) for name in backends}
    chosen = {name: contestant(form, inputs) for name, form in peers.FORMS.items() if name in chosen_peers}
    sides = contest.prepare(case.name, able, chosen, exact, MAX_ERROR)
    common = {**contest.described(case, "decode"), "kind": case.kind}
    needed = work(case)
    for row in contest.rows(common, *sides, needed, roofs, seconds=SECONDS, host=case.B == 1):
        yield contest.with_all_rates(row, needed)
