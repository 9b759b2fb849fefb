"""The benchmark's command line and its rows, without a GPU: the clocks are replaced, everything else is real."""

import json

import pytest
import torch

import hylo_ops
from bench import __main__ as command
from bench import gated_rms_norm as bench
from bench import peers, timing

CASE = bench.CASES["mamba2-1b-decode-64"]
TIMES = {"us": 20.0, "graph_us": 4.0}


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, every backend the reference, clocks that return fixed numbers."""
    public = hylo_ops.gated_rms_norm

    def reference(x, gate, weight, **keywords):
        return public(x, gate, weight, **{**keywords, "backend": "reference"})

    def inputs(case):
        x = torch.randn(case.B, case.T, case.H, case.V, generator=torch.Generator().manual_seed(1))
        return x.to(case.dtype), x.flip(0).to(case.dtype), torch.ones(case.H, case.V, dtype=case.dtype)

    monkeypatch.setattr(hylo_ops, "gated_rms_norm", reference)
    monkeypatch.setattr(bench, "inputs", inputs)
    clocks = {name: {"us": 30.0, "graph_us": 12.0} for name in bench.PEERS}
    monkeypatch.setattr(timing, "rotate", lambda calls: {name: dict({**clocks, "ours": TIMES}[name]) for name in calls})
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 123)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_without_a_gpu_one_sentence(tmp_path):
    with pytest.raises(command.BadArgument, match="need an NVIDIA GPU"):
        command.main(["gated_rms_norm", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "there is no benchmark 'no_such_op'"),
        (["gated_rms_norm", "--case", "gdn-1b-8k", "huge"], "there is no case 'huge'"),
        (["gated_rms_norm", "--peers", "flash"], "there is no peer 'flash'"),
    ],
)
def test_unknown_names_are_quoted(arguments, message):
    with pytest.raises(command.BadArgument, match=message):
        command.main(arguments)


def test_a_row_counts_and_compares(on_cpu):
    row = json.loads(json.dumps(bench.run(CASE, ["torch", "mamba_ssm"], bandwidth=1e12)))
    assert row["shape"] == {"B": 64, "T": 1, "H": 32, "V": 64}
    assert row["pass"] == "decode"
    assert row["bytes"] == (3 * 64 * 32 * 64 + 32 * 64) * 2
    assert row["roofline"] == pytest.approx(row["bytes"] / 4e-6 / 1e12)
    assert (row["mode"], row["best_peer"], row["ratio"]) == ("graph", "torch", pytest.approx(3.0))
    assert row["peers"]["torch"]["error"] < 1e-2
    assert (row["us"], row["graph_us"], row["host_us"]) == (20.0, 4.0, 7.5)


def test_a_wrong_peer_is_not_compared(on_cpu, monkeypatch):
    monkeypatch.setitem(bench.PEERS, "torch", lambda x, *rest: lambda: torch.zeros_like(x))
    row = bench.run(CASE, ["torch"], bandwidth=1e12)
    assert "disagrees with float64" in row["peers"]["torch"]["missing"]
    assert row["ratio"] is None


def test_a_missing_and_a_broken_peer_are_named(on_cpu, monkeypatch):
    def broken(*_):
        raise OSError("cannot load its library")

    monkeypatch.setitem(bench.PEERS, "torch", broken)
    row = bench.run(CASE, ["torch", "fla"], bandwidth=1e12)
    assert "cannot load its library" in row["peers"]["torch"]["missing"]
    assert row["peers"]["fla"]["missing"]


def test_our_own_wrong_result_stops_before_the_clock(on_cpu, monkeypatch):
    right = hylo_ops.gated_rms_norm

    def wrong_in_cuda(*tensors, backend, **keywords):
        return right(*tensors, backend=backend, **keywords) * (2 if backend == "cuda" else 1)

    monkeypatch.setattr(hylo_ops, "gated_rms_norm", wrong_in_cuda)
    monkeypatch.setattr(timing, "rotate", lambda calls: pytest.fail("timed a wrong result"))
    with pytest.raises(AssertionError, match="mamba2-1b-decode-64: error"):
        bench.run(CASE, [], bandwidth=1e12)


def test_eager_mode_where_a_side_is_not_captured():
    entries = {"a": {"us": 50.0, "graph_us": None}, "b": {"missing": "not installed"}}
    assert bench.comparison(TIMES, entries) == {"mode": "eager", "best_peer": "a", "ratio": 2.5}


def test_fla_is_refused_where_it_has_no_such_form():
    x = torch.zeros(1, 1, 2, 8)
    with pytest.raises(peers.Missing):
        bench.PEERS["fla"](x, x, torch.ones(2, 8), 1e-5, False)
