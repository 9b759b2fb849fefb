"""The benchmark of skinny_linear without a GPU: clocks are replaced, everything else is real."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import hylo
from bench import skinny_linear, timing
from bench.contest import Roofs
from hylo.mixers import GatedDeltaNet, Mamba2

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
SMALL = {
    kind: replace(skinny_linear.CASES[f"{name}-16"], B=3, N=24, K=32)
    for kind, name in (
        ("plain", "1b-gdn-in"),
        ("swiglu", "1b-mlp-up"),
        ("add", "1b-mlp-down"),
        ("norm", "1b-head-step"),
        ("norm swiglu", "1b-mlp-up-step"),
        ("norm conv", "1b-gdn-in-step"),
    )
}
SMALL["norm conv"] = replace(SMALL["norm conv"], channels=16)


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers and run whole turns."""
    turns = {}

    def rotate(calls, seconds):
        for name, call in calls.items():
            turns[name] = len(call)
            for _ in range(len(call)):
                assert call().isfinite().all()
        return {name: {"us": 40.0, "graph_us": 10.0 if name == "reference" else 20.0} for name in calls}

    monkeypatch.setattr(timing, "rotate", rotate)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 0)
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(skinny_linear, "draw", partial(skinny_linear.draw, device="cpu"))
    monkeypatch.setattr(skinny_linear, "COLD_BYTES", 1 << 14)
    return turns


def rows(case, backends):
    return json.loads(json.dumps(list(skinny_linear.run(case, backends, skinny_linear.PEERS, ROOFS))))


@pytest.mark.parametrize("kind", SMALL)
def test_everybody_computes_the_same_on_weights_in_turn(on_cpu, kind):
    case = SMALL[kind]
    (row,) = rows(case, ["reference"])
    shape = {"B": 3, "N": 24, "K": 32} | ({"D": 16} if kind == "norm conv" else {})
    assert (row["pass"], row["kind"], row["shape"]) == ("decode", kind, shape)
    assert (row["mode"], row["ratio"], row["host_us"]) == ("graph", pytest.approx(2.0), None)
    assert row["peers"]["torch"]["error"] < 1e-2
    assert row["bytes_per_second"] == pytest.approx(1e5 * row["bytes"])
    assert on_cpu == dict.fromkeys(("reference", "torch"), -(-(1 << 14) // (2 * 32 * case.rows)))


def test_a_call_of_one_row_is_timed_on_the_host_too(on_cpu):
    (row,) = rows(replace(SMALL["plain"], B=1), ["reference"])
    assert row["host_us"] == 7.5


def test_a_backend_that_cannot_run_says_why(on_cpu):
    (row,) = rows(SMALL["add"], ["triton"])
    assert "on cpu, not on a CUDA device" in row["missing"]


def test_a_step_has_other_backends(on_cpu):
    found = {kind: [row["backend"] for row in rows(SMALL[kind], skinny_linear.BACKENDS)] for kind in ("plain", "norm")}
    assert found == {"plain": ["cuda", "triton"], "norm": ["cuda", "composed"]}


def test_work_by_hand():
    """MB and GFLOP."""
    for name, read, per_row, flop in (
        ("1b-gdn-in", 9232 * 2048, 2048 + 9232, 2 * 9232 * 2048),
        ("1b-mlp-up", 16384 * 2048, 2048 + 8192, 2 * 16384 * 2048),
        ("1b-mlp-down", 2048 * 8192, 8192 + 2 * 2048, 2 * 2048 * 8192),
    ):
        for B in (1, 64):
            work = skinny_linear.work(skinny_linear.CASES[f"{name}-{B}"])
            assert (work.bytes, work.flop) == (2 * (read + B * per_row), B * flop)


def products(model):
    """Rows and width of the weights of each product of a step, packed."""
    for layer in model.model.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, GatedDeltaNet):
            groups = [itertools.chain(*mixer._projections()), (mixer.o_proj,)]
        elif isinstance(mixer, Mamba2):
            groups = [(mixer.in_proj,), (mixer.out_proj,)]
        else:
            groups = [(mixer.q_a_proj, mixer.kv_a_proj_with_mqa), (mixer.q_b_proj,), (mixer.o_proj,)]
        for group in (*groups, (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,), (model.lm_head,)):
            shapes = [layer.weight.shape for layer in group]
            yield -(-sum(rows for rows, _ in shapes) // 8) * 8, shapes[0][1]


@pytest.mark.parametrize(
    ("size", "names"), [("1b", ["Llama-4MLA12GDN"]), ("3b", ["Llama-6MLA22M2", "Llama-14MLA14GDN"])]
)
def test_cases_are_the_products_of_the_models(size, names):
    found = set()
    for name in names:
        with torch.device("meta"):
            found |= set(products(hylo.HyloForCausalLM(hylo.published_variants()[name])))
    cases = [case for case in skinny_linear.CASES.values() if case.name.startswith(size)]
    assert {(case.rows, case.K) for case in cases} == found
    assert {case.B for case in cases} == {1, 16, 64}
