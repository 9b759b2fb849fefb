"""Benchmark of expanded attention without a GPU: ours is the reference, the clocks are replaced, all else is real."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import hylo_ops
from bench import __main__ as command
from bench import mla_attention, timing
from bench.contest import Roofs

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
TINY = replace(mla_attention.CASES["hylo-1b-8k"], name="tiny", B=2, T=50, H=4, HK=2, K=16, V=16)
UNEQUAL = replace(TINY, name="unequal", K=24)


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers: ours 4 us, a peer 12."""
    times = {"reference": {"us": 20.0, "graph_us": 4.0}}
    longer = {"us": 30.0, "graph_us": 12.0}
    monkeypatch.setattr(timing, "rotate", lambda calls, seconds: {n: dict(times.get(n, longer)) for n in calls})
    monkeypatch.setattr(timing, "peak_bytes", lambda call: call() and 123)
    monkeypatch.setattr(mla_attention, "draw", partial(mla_attention.draw, device="cpu"))


def rows(case, chosen_peers=mla_attention.PEERS, backends=("reference",)):
    return json.loads(json.dumps(list(mla_attention.run(case, list(backends), list(chosen_peers), ROOFS))))


def test_8k_and_64k_tokens_of_both_models_are_there():
    found = {name: tuple(case.shape.values()) for name, case in mla_attention.CASES.items()}
    assert found == {
        "hylo-1b-8k": (1, 8192, 32, 8, 64, 64),
        "hylo-3b-8k": (1, 8192, 24, 8, 128, 128),
        "hylo-1b-64k": (1, 65536, 32, 8, 64, 64),
        "hylo-3b-64k": (1, 65536, 24, 8, 128, 128),
    }
    widths = {(case.HK, case.K, case.V) for case in mla_attention.EXTRA_CASES.values()}
    assert widths == {(8, 128, 128), (40, 96, 64), (16, 192, 128)}


def test_work_by_hand():
    case = replace(TINY, B=2, T=3, H=4, HK=2, K=5, V=7)
    seen = 2 * (1 + 2 + 3)
    forward, both = (mla_attention.work(case, pass_) for pass_ in mla_attention.PASSES)
    assert forward.flop == 2 * 4 * seen * (5 + 7)
    assert both.flop - forward.flop == 2 * 4 * seen * (3 * 5 + 2 * 7)
    q, k, v, o = (2 * 2 * 3 * n for n in (4 * 5, 2 * 5, 2 * 7, 4 * 7))
    assert forward.bytes == q + k + v + o
    assert both.bytes - forward.bytes == 2 * (q + k + v + o)


@pytest.mark.parametrize("case", [TINY, UNEQUAL], ids=["tiny", "unequal"])
def test_everybody_computes_the_same(on_cpu, case):
    forward, both = rows(case)
    assert (forward["pass"], both["pass"]) == mla_attention.PASSES
    assert set(forward["errors"]) == {"o"}
    assert set(both["errors"]) == {"dq", "dk", "dv"}
    for row in (forward, both):
        assert (row["shape"], row["checked_T"], row["peak_bytes"]) == (case.shape, 50, 123)
        assert list(row["peers"]) == ["torch", "torch_repeated"]
        assert all(entry["error"] < 1e-2 for entry in (row, *row["peers"].values()))
        assert row["flop_per_second"] == pytest.approx(row["flop"] / 4e-6)
        assert row["peers"]["torch"]["flop_per_second"] == pytest.approx(row["flop"] / 12e-6)
        assert row["ratio"] == pytest.approx(3.0)
    command.show([forward, both])


def test_a_long_case_is_compared_on_its_first_tokens(on_cpu, monkeypatch):
    monkeypatch.setattr(mla_attention, "CHECKED_TOKENS", 17)
    for row in rows(TINY):
        assert row["checked_T"] == 17
        assert row["peers"]["torch"]["error"] < 1e-2


def test_backends_that_need_a_gpu_are_missing_with_their_reason(on_cpu):
    for row in rows(TINY, [], mla_attention.BACKENDS):
        assert "q is on cpu, not on a CUDA device" in row["missing"]
        assert row["us"] is row["roofline"] is row["error"] is None


def test_a_wrong_gradient_of_ours_stops_before_the_clock(on_cpu, monkeypatch):
    right = hylo_ops.mla_attention

    def without_gradient_of_k(q, k, v, *, scale, backend):
        reference = backend == "reference"
        return right(q, k if reference else k.detach() + 0 * k, v, scale=scale, backend="reference")

    monkeypatch.setattr(hylo_ops, "mla_attention", without_gradient_of_k)
    with pytest.raises(AssertionError, match=r"tiny, forward_backward: error 1.0e\+00 of dk"):
        rows(TINY, [], ["cudnn"])


def test_peers_read_the_same_memory():
    inputs = mla_attention.draw(TINY, device="cpu")
    assert inputs.first(50) is inputs
    assert torch.equal(inputs.first(10).k, inputs.k[:, :10])
