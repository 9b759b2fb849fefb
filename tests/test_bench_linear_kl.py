"""Benchmark of the head's losses without a GPU: peers are their argument forms over PyTorch, the clocks are replaced,
everything else is real.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import linear_kl, timing
from bench.contest import Roofs
from bench.peers import Missing
from bench.peers import linear_kl as peers

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
# fp32: a CPU rounds the logits of 16-bit products, and then ours is allowed less than that.
KL = replace(linear_kl.CASES["llama-1b-8k"], name="kl", N=21, D=16, DT=24, V=301, dtype=torch.float32)
CE = replace(linear_kl.CASES["llama-1b-8k-ce"], name="ce", N=21, D=16, V=301, dtype=torch.float32)


def kl_divergence(hidden, weight, teacher_hidden, teacher_weight):
    log_q, log_p = ((h @ w.T).float().log_softmax(-1) for h, w in ((hidden, weight), (teacher_hidden, teacher_weight)))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


class LigerFusedLinearJSD:
    def __init__(self, jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None):
        assert jsd_beta == 0.0
        assert accum_dtype in (None, torch.float32)

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels):
        assert shift_labels is None
        return kl_divergence(student_input, student_weight, teacher_input, teacher_weight)


class LigerFusedLinearJSDLoss:
    def __init__(self, weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5):
        assert (weight_hard_loss, weight_soft_loss, beta) == (0, 1, 0)

    def __call__(self, student_input, student_weight, teacher_input, teacher_weight, true_labels):
        assert (true_labels >= 0).all()
        return kl_divergence(student_input, student_weight, teacher_input, teacher_weight)


class LigerFusedLinearCrossEntropyLoss:
    def __init__(self, accum_dtype=None):
        assert accum_dtype in (None, torch.float32)

    def __call__(self, lin_weight, _input, target):
        return F.cross_entropy((_input @ lin_weight.T).float(), target)


def fused_kl_div_loss(x, target_x, weight, target_weight):
    return kl_divergence(x, weight, target_x, target_weight)


def fused_linear_cross_entropy_loss(x, target, weight):
    return F.cross_entropy((x @ weight.T).float(), target)


LIBRARIES = {
    "fla.modules.fused_kl_div": fused_kl_div_loss,
    "fla.modules.fused_linear_cross_entropy": fused_linear_cross_entropy_loss,
    "liger_kernel.transformers.fused_linear_jsd": LigerFusedLinearJSD,
    "liger_kernel.transformers.fused_linear_cross_entropy": LigerFusedLinearCrossEntropyLoss,
    "liger_kernel.chunked_loss.jsd_loss": LigerFusedLinearJSDLoss,
}


def library(module, name):
    found = LIBRARIES[module]
    assert found.__name__ == name
    return found


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers."""
    times = {"chunked": {"us": 20.0, "graph_us": None}}
    longer = {"us": 30.0, "graph_us": 12.0}
    monkeypatch.setattr(timing, "rotate", lambda calls, seconds: {n: dict(times.get(n, longer)) for n in calls})
    monkeypatch.setattr(timing, "peak_bytes", lambda call: len(call()))
    monkeypatch.setattr(linear_kl, "draw", partial(linear_kl.draw, device="cpu"))


def rows(case, chosen_peers=None, backends=("chunked",)):
    names = linear_kl.PEERS if chosen_peers is None else chosen_peers
    return json.loads(json.dumps(linear_kl.run(case, list(backends), list(names), ROOFS)))


@pytest.mark.parametrize(("case", "absent"), [(KL, set()), (CE, {"liger_chunked"})], ids=["kl", "ce"])
def test_everybody_computes_the_same(on_cpu, monkeypatch, case, absent):
    monkeypatch.setattr(peers, "imported", library)
    (row,) = rows(case)
    assert set(row["errors"]) == {"loss", "dhidden", "dweight"}
    assert (row["gates"], row["pass"], row["peak_bytes"]) == (
        "kl" if case is KL else "cross_entropy",
        "forward_backward",
        3,
    )
    assert {name for name, entry in row["peers"].items() if "missing" in entry} == absent
    for name in set(linear_kl.PEERS) - absent:
        assert row["peers"][name]["error"] < 1e-5, name
    assert (row["mode"], row["ratio"]) == ("eager", pytest.approx(1.5))


def test_libraries_that_are_not_there_are_missing(on_cpu, monkeypatch):
    def absent(module, name):
        raise Missing(f"not installed: {module}")

    monkeypatch.setattr(peers, "imported", absent)
    (row,) = rows(KL, ["torch", "fla", "liger_fp32"])
    assert "not installed: fla.modules.fused_kl_div" in row["peers"]["fla"]["missing"]
    assert "not installed: liger_kernel" in row["peers"]["liger_fp32"]["missing"]
    assert row["best_peer"] == "torch"


def test_logits_that_do_not_fit_are_a_reason(on_cpu, monkeypatch):
    def no_room(inputs):
        def run():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 31 GiB")

        return run

    monkeypatch.setitem(linear_kl.PEERS, "torch", no_room)
    (row,) = rows(KL, ["torch"])
    assert "Tried to allocate 31 GiB" in row["peers"]["torch"]["missing"]


def test_a_wrong_result_of_ours_ends_the_run(on_cpu, monkeypatch):
    right = linear_kl.ours
    wrong = {"triton": lambda inputs: lambda: [2 * t for t in right("chunked", inputs)()]}
    monkeypatch.setattr(linear_kl, "ours", lambda backend, inputs: wrong.get(backend, partial(right, backend))(inputs))
    with pytest.raises(AssertionError, match=r"kl: error 1.0e\+00 of loss"):
        rows(KL, [], ["triton"])


def test_the_cases_of_the_issue():
    shapes = {tuple(case.shape.values()) for case in linear_kl.CASES.values()}
    assert {(8192, 2048, 4096, 128256), (65536, 2048, 4096, 128256)} <= shapes
    assert {"torch", "fla", "liger"} <= set(linear_kl.PEERS)


def test_work_by_hand():
    kl = linear_kl.work(linear_kl.CASES["llama-1b-8k"])
    assert kl.flop == 8192 * 128256 * (3 * 2 * 2048 + 2 * 4096)
    assert kl.bytes == 2 * (2 * (8192 + 128256) * 2048 + (8192 + 128256) * 4096)
    assert linear_kl.work(linear_kl.CASES["llama-1b-8k-ce"]).flop == 8192 * 128256 * 6 * 2048


def test_logits_of_the_drawn_inputs_are_of_a_models_size():
    inputs = linear_kl.draw(replace(KL, N=64, D=64, DT=64), device="cpu")
    for hidden, weight in ((inputs.hidden, inputs.weight), (inputs.teacher_hidden, inputs.teacher_weight)):
        assert (hidden @ weight.T).std().item() == pytest.approx(linear_kl.LOGIT, rel=0.1)
