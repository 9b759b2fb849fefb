"""Benchmarks of rms_norm, swiglu and l2_norm without a GPU: libraries are their argument forms over PyTorch, the clocks
are replaced, everything else is real.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import l2_norm, rms_norm, swiglu, timing
from bench.contest import Roofs
from bench.peers import Missing
from bench.peers import l2_norm as l2_peers
from bench.peers import rms_norm as norm_peers
from bench.peers import swiglu as swiglu_peers

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
CASES = [
    *((rms_norm, replace(rms_norm.CASES[name], T=21, D=32)) for name in ("1b-32k-residual", "1b-32k-fp32", "1b-32k")),
    (swiglu, replace(swiglu.CASES["1b-32k"], T=21, N=24)),
    (l2_norm, replace(l2_norm.CASES["1b-32k"], B=2, T=9, H=3, K=16, channels=4 * 48)),
]


def norm(x, weight, eps):
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def fla_rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    assert bias is None
    if residual is None:
        return norm(x, weight, eps)
    assert prenorm
    total = residual + x
    return norm(total, weight, eps).to(x.dtype), total


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return norm(X, W, eps)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place
    return norm(X + R, W, eps), X + R


LIBRARIES = {
    ("fla.modules.layernorm", "rms_norm"): fla_rms_norm,
    ("fla.modules.activations", "swiglu"): lambda x, y: F.silu(x) * y,
    ("fla.modules.l2norm", "l2norm"): lambda x, eps: (F.normalize(x.float(), dim=-1)).to(x.dtype),
    ("liger_kernel.transformers.functional", "liger_rms_norm"): liger_rms_norm,
    ("liger_kernel.transformers.functional", "liger_fused_add_rms_norm"): liger_fused_add_rms_norm,
    ("liger_kernel.transformers.functional", "liger_swiglu"): lambda a, b: F.silu(a) * b,
}


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers."""
    times = {"reference": {"us": 20.0, "graph_us": 10.0}}
    longer = {"us": 40.0, "graph_us": 20.0}
    monkeypatch.setattr(timing, "rotate", lambda calls, seconds: {n: dict(times.get(n, longer)) for n in calls})
    monkeypatch.setattr(timing, "peak_bytes", lambda call: len(call()))
    for module in (rms_norm, swiglu, l2_norm):
        monkeypatch.setattr(module, "draw", partial(module.draw, device="cpu"))


def rows(module, case, backends=("reference",)):
    return json.loads(json.dumps(list(module.run(case, list(backends), list(module.PEERS), ROOFS))))


@pytest.mark.parametrize(("module", "case"), CASES, ids=lambda part: getattr(part, "name", None))
def test_everybody_computes_the_same(on_cpu, monkeypatch, module, case):
    for peers in (norm_peers, swiglu_peers, l2_peers):
        monkeypatch.setattr(peers, "imported", lambda module, name: LIBRARIES[module, name])
    found = rows(module, case)
    assert [row["pass"] for row in found] == ["forward", "forward_backward"]
    for row in found:
        assert row["shape"] == case.shape
        assert row["bytes"] > 0
        assert (row["mode"], row["ratio"]) == ("graph", pytest.approx(2.0))
        for name, entry in row["peers"].items():
            assert entry["error"] < 1e-2, (name, entry)


@pytest.mark.parametrize(("module", "case"), CASES, ids=lambda part: getattr(part, "name", None))
def test_libraries_that_are_not_there_are_missing(on_cpu, monkeypatch, module, case):
    def absent(module, name):
        raise Missing(f"not installed: {module}")

    for peers in (norm_peers, swiglu_peers, l2_peers):
        monkeypatch.setattr(peers, "imported", absent)
    for row in rows(module, case):
        assert "not installed: fla.modules" in row["peers"]["fla"]["missing"]
        assert row["best_peer"].startswith("torch")


def test_a_backend_that_cannot_run_says_why(on_cpu):
    for module, case in CASES:
        for row in rows(module, case, ["triton"]):
            assert "on cpu, not on a CUDA device" in row["missing"]


def test_work_by_hand():
    """Bytes a number of y: what docs/ has."""
    residual, wide, plain = (rms_norm.CASES[name] for name in ("1b-32k-residual", "1b-32k-fp32", "1b-32k"))
    numbers = 32768 * 2048
    for case, forward, both in ((residual, 12, 12 + 16), (wide, 6, 6 + 10), (plain, 4, 4 + 6)):
        assert rms_norm.work(case, "forward").bytes == forward * numbers
        assert rms_norm.work(case, "forward_backward").bytes == both * numbers
    assert swiglu.work(swiglu.CASES["1b-32k"], "forward_backward").bytes == 16 * 32768 * 8192
    assert l2_norm.work(l2_norm.CASES["1b-32k"], "forward_backward").bytes == 10 * 32768 * 1536


def test_what_is_normed_lies_within_a_projection():
    x = l2_norm.draw(CASES[-1][1], "cpu").x
    assert x.stride() == (9 * 192, 192, 16, 1)
    assert x.storage_offset() == 48


def test_dtypes_are_those_of_a_training_step():
    inputs = rms_norm.draw(CASES[0][1], "cpu")
    assert inputs.residual.dtype == inputs.weight.dtype == torch.float32
    assert inputs.x.dtype == inputs.dtype == torch.bfloat16
