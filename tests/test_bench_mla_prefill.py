"""Benchmark of a prefill without a GPU: peers are their argument forms over PyTorch's attention, the clocks are
replaced, everything else is real.
"""

import json
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import hylo_ops
from bench import __main__ as command
from bench import mla_absorb, mla_prefill, timing
from bench.contest import Roofs
from bench.peers import mla_prefill as peers

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
TINY = replace(mla_prefill.CASES["hylo-1b-16k-256k"], name="tiny", S=300, T=100, H=4, HK=2, slice_tokens=64)
UNEQUAL = replace(TINY, name="unequal", nope=64, v=32, S=100)  # nothing before the chunk
TORCH = ["torch_cudnn", "torch_cudnn_grouped", "torch_flash"]
LIBRARIES = ["fa3", "flashinfer_fa3"]


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers: ours 4 ms, a peer 1 ms."""

    def rotate(calls, seconds):
        for call in calls.values():
            call()
        return {name: {"us": 4000.0 if name == "sliced" else 1000.0, "graph_us": None} for name in calls}

    monkeypatch.setattr(timing, "rotate", rotate)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 123)
    monkeypatch.setattr(mla_absorb, "seeded", partial(mla_absorb.seeded, device="cpu"))
    monkeypatch.setattr(mla_absorb, "COLD_BYTES", 1)


def attend(q, k, v, scale):
    """[T, H, width] each, in the libraries' layout."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def flash_attn_varlen_func(
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    cu_seqlens_k=None,
    softmax_scale=None,
    causal=False,
    fa_version=2,
):
    assert fa_version == 3
    assert not causal
    for bounds, tokens in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert bounds.dtype == torch.int32
        assert bounds.tolist() == [0, tokens]
    return attend(q, k, v, softmax_scale)


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", backend="auto"):
        assert (kv_layout, backend) == ("NHD", "fa3")
        assert float_workspace_buffer.numel() >= 128 << 20

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        causal=False,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
    ):
        assert not causal
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        assert q_data_type == kv_data_type == torch.bfloat16
        self.shapes = [(qo_indptr, num_qo_heads, head_dim_qk), (kv_indptr, num_kv_heads, head_dim_qk)]
        self.shapes.append((kv_indptr, num_kv_heads, head_dim_vo))
        self.scale = sm_scale

    def run(self, q, k, v):
        assert [(len(t), *t.shape[1:]) for t in (q, k, v)] == [(b[1], *rest) for b, *rest in self.shapes]
        return attend(q, k, v, self.scale)


@pytest.fixture
def libraries(monkeypatch):
    found = {
        "vllm.vllm_flash_attn": flash_attn_varlen_func,
        "flashinfer.prefill": BatchPrefillWithRaggedKVCacheWrapper,
    }
    for name, thing in found.items():
        for package in (name.split(".")[0], name):
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setattr(sys.modules[name], thing.__name__, thing, raising=False)

    def by_torch(q, k, v, scale):
        assert all(t.is_contiguous() for t in (q, k, v))
        return attend(*(t[0].transpose(0, 1) for t in (q, k, v)), scale).transpose(0, 1)[None]

    for name in peers.ENGINES:
        monkeypatch.setitem(peers.ENGINES, name, by_torch)


def rows(case, chosen_peers=(), backends=("sliced",)):
    return json.loads(json.dumps(list(mla_prefill.run(case, list(backends), list(chosen_peers), ROOFS))))


def test_the_case_of_the_bar_is_there():
    """64K tokens against 1M of latent context at 1B's dims, and a smaller one; 3B's as well."""
    letters = ("B", "T", "S", "H", "R", "E")
    found = {name: tuple(case.shape[x] for x in letters) for name, case in mla_prefill.CASES.items()}
    small, large = (16 * 1024, 272 * 1024), (64 * 1024, 1088 * 1024)
    assert found == {
        "hylo-1b-16k-256k": (1, *small, 32, 128, 32),
        "hylo-3b-16k-256k": (1, *small, 24, 128, 64),
        "hylo-1b-64k-1024k": (1, *large, 32, 128, 32),
        "hylo-3b-64k-1024k": (1, *large, 24, 128, 64),
    }
    assert [case.slice_tokens // 1024 for case in mla_prefill.EXTRA_CASES.values()] == [8, 16, 64, 128] * 2
    assert [*TORCH, *LIBRARIES] == mla_prefill.PEERS


def test_work_by_hand():
    case = replace(TINY, B=1, S=5, T=3, H=2, HK=1, R=4, E=2, nope=6, v=8)
    seen = 3 + 4 + 5  # by the three queries
    assert mla_prefill.work(case).flop == 2 * 2 * seen * (8 + 8)
    assert mla_prefill.work(case).bytes == 2 * (5 * 6 + 3 * 2 * (8 + 8) + 4 * (6 + 8))
    assert mla_prefill.block_work(case).flop == 2 * 2 * 9 * (8 + 8)
    assert mla_prefill.block_work(case).bytes == 2 * (3 * 2 * (8 + 8) + 3 * 1 * (8 + 8))
    bar = mla_prefill.CASES["hylo-1b-64k-1024k"]
    assert mla_prefill.work(bar).flop == 2 * 32 * (65536 * 2**20 + 65536 * 65537 // 2) * (64 + 64)


@pytest.mark.parametrize("case", [TINY, UNEQUAL], ids=["tiny", "unequal"])
def test_everybody_computes_the_same_and_is_compared_by_rate(on_cpu, libraries, case):
    (row,) = rows(case, mla_prefill.PEERS)
    assert (row["shape"], row["pass"], row["slice_tokens"]) == (case.shape, "forward", 64)
    assert row["error"] < 1e-2
    assert row["peak_bytes"] == 123
    assert list(row["peers"]) == mla_prefill.PEERS
    rate = row["flop"] / 4e-3
    block = mla_prefill.block_work(case).flop
    assert row["flop_per_second"] == pytest.approx(rate)
    for entry in row["peers"].values():
        assert entry["error"] < 1e-2
        assert (entry["flop"], entry["flop_per_second"]) == (block, pytest.approx(block / 1e-3))
    assert (row["mode"], row["best_peer"]) == ("eager", "torch_cudnn")
    assert row["ratio"] == pytest.approx(rate / (block / 1e-3))
    command.show([row])


def test_float64_is_asked_for_queries_of_the_chunks_begin_middle_and_end(on_cpu):
    x = mla_prefill.draw(TINY, mla_absorb.seeded())
    checked = mla_prefill.checked_queries(TINY)
    assert checked == [slice(0, 16), slice(42, 58), slice(84, 100)]
    whole = mla_prefill.prefill(x, "reference", 64, dtype=torch.float64)
    expected = torch.cat([whole[:, some] for some in checked], dim=1)
    torch.testing.assert_close(mla_prefill.exact_results(TINY, x)["o"], expected, rtol=0, atol=1e-12)


def test_what_is_not_there_is_missing_with_its_reason(on_cpu):
    (row,) = rows(TINY, mla_prefill.PEERS)
    assert all(entry["missing"] for entry in row["peers"].values())
    assert "not installed" in row["peers"]["fa3"]["missing"]
    assert (row["best_peer"], row["ratio"], row["us"]) == (None, None, 4000.0)
    command.show([row])


def broken(right, change):
    def mla_prefill(*tensors, backend, **options):
        o = right(*tensors, backend=backend, **options)
        return o if backend == "reference" else change(o)

    return mla_prefill


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: 2 * o, r"tiny: error 1.0e\+00 of o"),
        (lambda o: o.index_fill(1, torch.tensor([20]), torch.nan), "tiny: gives NaN or Inf"),
    ],
    ids=["wrong", "nan-where-float64-does-not-look"],
)
def test_a_wrong_result_of_ours_stops_before_the_clock(on_cpu, monkeypatch, change, message):
    monkeypatch.setattr(hylo_ops, "mla_prefill", broken(hylo_ops.mla_prefill, change))
    with pytest.raises(AssertionError, match=message):
        rows(TINY)


def test_a_call_of_a_second_is_not_captured(monkeypatch):
    """The clocks themselves, on a device that takes 1 us and 0.5 s."""
    takes = {"short": 1.0, "long": 5e5}
    captured = []
    monkeypatch.setattr(timing, "device_us", lambda call, calls: takes.get(call() or "", 1.0))
    monkeypatch.setattr(timing, "capture", lambda call, calls: captured.append(call()) or Graph())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = timing.rotate({"short": lambda: "short", "long": lambda: "long"}, seconds=0.6)
    assert captured == ["short"]
    assert (found["long"]["us"], found["long"]["graph_us"]) == (5e5, None)
    assert "not captured" in found["long"]["graph_error"]
    assert found["short"]["graph_us"] is not None
    assert "graph_error" not in found["short"]


class Graph:
    def replay(self):
        return None
