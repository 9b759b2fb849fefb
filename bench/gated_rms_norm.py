"""Gated RMS norm, forward: one row a case."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import peers, timing
from bench.shapes import GATED_RMS_NORM, NormCase
from hylo_ops.testing import DTYPE_NAMES, relative_error, within_budget

CASES = {case.name: case for case in GATED_RMS_NORM}
PEERS = peers.GATED_RMS_NORM
EPS = 1e-5
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


def bytes_moved(case: NormCase) -> int:
    """Each input read once, the output written once."""
    elements = case.B * case.T * case.H * case.V
    weights = case.V if case.norm_before_gate else case.H * case.V
    return (3 * elements + weights) * case.dtype.itemsize


def run(case: NormCase, chosen_peers: list[str], bandwidth: float) -> dict[str, Any]:
    """Correctness first, then the clocks.

    Raises:
        AssertionError: our result is outside the error budget.
    """
    x, gate, weight = inputs(case)

    def ours(backend: str) -> Callable[[], Tensor]:
        return lambda: hylo_ops.gated_rms_norm(
            x, gate, weight, eps=EPS, norm_before_gate=case.norm_before_gate, backend=backend
        )

    exact = hylo_ops.gated_rms_norm(
        x.double(), gate.double(), weight.double(), eps=EPS, norm_before_gate=case.norm_before_gate, backend="reference"
    )
    result = ours("cuda")()
    within_budget(result, ours("reference")(), exact, case.name)
    entries, calls = prepare_peers(case, (x, gate, weight), chosen_peers, exact)
    error = relative_error(result, exact)
    del exact, result
    times = timing.rotate({"ours": ours("cuda"), **calls})
    for name in calls:
        entries[name].update(times[name])
    return {
        "case": case.name,
        "shape": case.shape,
        "dtype": DTYPE_NAMES[case.dtype],
        "state_dtype": None,
        "gates": "norm_first" if case.norm_before_gate else "gate_first",
        "pass": "decode" if case.T == 1 else "forward",
        "backend": "cuda",
        **times["ours"],
        "host_us": timing.host_us(ours("cuda")),
        "bytes": bytes_moved(case),
        "flop": FLOP_PER_ELEMENT * x.numel(),
        "roofline": roofline(bytes_moved(case), times["ours"], bandwidth),
        "error": error,
        "peak_bytes": timing.peak_bytes(ours("cuda")),
        "peers": entries,
        **comparison(times["ours"], entries),
    }


def prepare_peers(
    case: NormCase, tensors: tuple[Tensor, Tensor, Tensor], chosen: list[str], exact: Tensor
) -> tuple[dict[str, dict[str, Any]], dict[str, Callable[[], Tensor]]]:
    """An entry for every peer, and the calls of those that take part: present and right."""
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in chosen:
        try:
            call = PEERS[name](*tensors, EPS, case.norm_before_gate)
            error = relative_error(call(), exact)
        except peers.Missing as reason:
            entries[name] = {"missing": str(reason)}
            continue
        except Exception as problem:  # a peer that breaks is a result, and must not end the run of the others
            entries[name] = {"missing": f"failed: {type(problem).__name__}: {str(problem).splitlines()[:1]}"}
            continue
        if error > MAX_PEER_ERROR[case.dtype]:
            entries[name] = {"missing": f"disagrees with float64: relative error {error:.1e}"}
            continue
        entries[name], calls[name] = {"error": error}, call
    return entries, calls


def roofline(moved: int, times: dict[str, Any], bandwidth: float) -> float:
    """Share of the copy bandwidth; the kernel does under one FLOP a byte, so memory is the roof."""
    return moved / (best_us(times) * 1e-6) / bandwidth


def best_us(times: dict[str, Any]) -> float:
    return times["us"] if times["graph_us"] is None else times["graph_us"]


def comparison(ours: dict[str, Any], entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best peer's time over ours, by graph where both sides were captured, else eager."""
    present = {name: entry for name, entry in entries.items() if "missing" not in entry}
    if not present:
        return {"mode": None, "best_peer": None, "ratio": None}
    best = min(present, key=lambda name: best_us(present[name]))
    captured = ours["graph_us"] is not None and present[best]["graph_us"] is not None
    column = "graph_us" if captured else "us"
    mode = "graph" if captured else "eager"
    return {"mode": mode, "best_peer": best, "ratio": present[best][column] / ours[column]}
