"""Benchmark of absorbed latent attention without a GPU: peers are their argument forms over the reference, the clocks
are replaced, everything else is real.
"""

import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hylo_ops
from bench import __main__ as command
from bench import mla_absorb, timing
from bench.contest import Roofs
from bench.peers import Missing
from bench.peers import mla_absorb as peers

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
TINY = replace(mla_absorb.CASES["hylo-1b-32x4k"], name="tiny", B=3, S=150, H=2)
SKEWED = replace(mla_absorb.CASES["qwen-64-skewed"], name="skewed", B=4, S=200, H=2)
DEEPSEEK = replace(mla_absorb.CASES["deepseek-h16-1x4k"], name="deepseek", B=2, S=70, H=2)
FP8 = replace(mla_absorb.CASES["hylo-1b-32x4k-fp8"], name="fp8", B=3, S=150, H=2)
STEP = replace(mla_absorb.CASES["hylo-3b-step-1"], name="step", B=2, S=70, H=4, HK=2)
GRID = [
    *((1, n * 1024) for n in (4, 32, 128, 1024, 2048)),
    *((32, n * 1024) for n in (4, 32, 128)),
    *((128, n * 1024) for n in (4, 32)),
]
# H, R, E of issue 5's table
DIMS = [(32, 128, 32), (24, 128, 64), (16, 256, 64), (32, 256, 32), (16, 512, 64), (128, 512, 64)]
FUSED = ["flashinfer_fa3", "flashinfer_fa2", "fa3", "flash_mla", "vllm_triton"]


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, a few copies of a cache, clocks that return fixed numbers."""
    times = {"reference": {"us": 20.0, "graph_us": 4.0}}
    longer = {"us": 30.0, "graph_us": 12.0}

    def rotate(calls, seconds):
        for call in calls.values():
            for _ in range(len(call) if isinstance(call, timing.Rotation) else 1):
                call()
        return {name: dict(times.get(name, longer)) for name in calls}

    monkeypatch.setattr(timing, "rotate", rotate)
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 123)
    monkeypatch.setattr(mla_absorb, "seeded", partial(mla_absorb.seeded, device="cpu"))
    monkeypatch.setattr(mla_absorb, "COLD_BYTES", 700_000)


def rows(case, chosen_peers=None, backends=("reference",)):
    names = mla_absorb.PEERS if chosen_peers is None else chosen_peers
    return json.loads(json.dumps(list(mla_absorb.run(case, list(backends), list(names), ROOFS))))


# The libraries, as far as they are called. What they demand is asserted, so that a call that they would refuse fails.


def attend(q_nope, q_rope, cache, lengths, table, scale):
    return hylo_ops.mla_absorb(
        q_nope, q_rope, cache, cache_seqlens=lengths, block_table=table, scale=scale, backend="reference"
    )


class BatchMLAPagedAttentionWrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.numel() >= 128 << 20
        assert backend in ("fa2", "fa3")

    def plan(
        self,
        *,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_len_arr,
        num_heads,
        head_dim_ckv,
        head_dim_kpe,
        page_size,
        causal,
        sm_scale,
        q_data_type,
        kv_data_type,
    ):
        assert (head_dim_ckv % 128, head_dim_kpe % 64) == (0, 0)
        assert {t.dtype for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1))
        assert kv_indptr.diff().tolist() == [-(-n // page_size) for n in kv_len_arr.tolist()]
        assert kv_indptr[-1] == len(kv_indices)
        assert not causal
        assert q_data_type == kv_data_type == torch.bfloat16
        self.heads, self.widths, self.page, self.scale = num_heads, (head_dim_ckv, head_dim_kpe), page_size, sm_scale
        self.lengths = kv_len_arr
        pages = kv_indices.split(kv_indptr.diff().tolist())
        self.table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)

    def run(self, *, query, kv_cache):
        assert tuple(t.shape[-1] for t in query) == tuple(t.shape[-1] for t in kv_cache) == self.widths
        assert query[0].shape[1] == query[1].shape[1] == self.heads
        assert kv_cache[0].shape[1] == self.page
        q_nope, q_pe = (t[:, None] for t in query)
        return attend(q_nope, q_pe, torch.cat(kv_cache, -1), self.lengths, self.table, self.scale)[:, 0]


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    page_size=None,
    causal=False,
    num_splits=0,
):
    assert max_seqlen_k == int(cache_seqlens.max())
    return headdim, headdim_v, num_heads_q, num_splits, causal


def flash_attn_varlen_func(
    q,
    k,
    v,
    max_seqlen_q,
    cu_seqlens_q,
    max_seqlen_k,
    seqused_k=None,
    q_v=None,
    softmax_scale=None,
    causal=False,
    block_table=None,
    scheduler_metadata=None,
    num_splits=0,
    fa_version=2,
):
    assert fa_version == 3
    assert scheduler_metadata == (q.shape[2], v.shape[3], q.shape[1], num_splits, causal)
    assert cu_seqlens_q.tolist() == list(range(len(seqused_k) + 1))
    assert (max_seqlen_q, k.shape[2], v.shape[2]) == (1, 1, 1)
    assert q.shape[2] == k.shape[3]
    R = v.shape[3]
    if q_v is None:
        assert R <= 128
        assert k.data_ptr() == v.data_ptr()
        q_nope, q_rope, cache = q[..., :R], q[..., R:], k[:, :, 0]
    else:
        assert R in (256, 512)
        assert q.shape[2] <= 64
        q_nope, q_rope, cache = q_v, q, torch.cat([v, k], -1)[:, :, 0]
    return attend(q_nope[:, None], q_rope[:, None], cache, seqused_k, block_table, softmax_scale)[:, 0]


class Schedule:
    pass


def flash_mla_with_kvcache(
    q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, softmax_scale=None, causal=False
):
    assert isinstance(tile_scheduler_metadata, Schedule)
    assert (q.shape[1], q.shape[3], k_cache.shape[1:], head_dim_v) == (1, 576, (64, 1, 576), 512)
    return attend(q[..., :512], q[..., 512:], k_cache[:, :, 0], cache_seqlens, block_table, softmax_scale), None


def decode_attention_fwd(
    q,
    k_buffer,
    v_buffer,
    o,
    lse,
    req_to_token,
    b_seq_len,
    attn_logits,
    num_kv_splits,
    sm_scale,
    page_size=1,
    k_scale=None,
    v_scale=None,
    is_mla=False,
):
    assert is_mla
    assert k_buffer.shape[1:3] == (page_size, 1)
    R = v_buffer.shape[3]
    assert attn_logits.shape == (*o.shape[:2], num_kv_splits, R + 1)
    assert (attn_logits.dtype, lse.shape) == (torch.float32, o.shape[:2])
    q_nope, q_rope = q[:, None].split([R, q.shape[2] - R], dim=-1)
    o.copy_(attend(q_nope, q_rope, k_buffer[:, :, 0], b_seq_len, req_to_token, sm_scale)[:, 0])


@pytest.fixture
def libraries(monkeypatch):
    found = {
        "flashinfer.mla": (BatchMLAPagedAttentionWrapper,),
        "vllm.vllm_flash_attn": (flash_attn_varlen_func, get_scheduler_metadata),
        "vllm.v1.attention.ops.triton_decode_attention": (decode_attention_fwd,),
        "flash_mla": (flash_mla_with_kvcache,),
    }
    for name, things in found.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package) or ModuleType(package))
        for thing in things:
            monkeypatch.setattr(sys.modules[name], thing.__name__, thing, raising=False)
    monkeypatch.setattr(sys.modules["flash_mla"], "get_mla_metadata", lambda: (Schedule(), None), raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))


# Cases, inputs and counts


def test_every_case_of_the_bar_is_there():
    in_fp8 = [case for case in mla_absorb.CASES.values() if case.fp8]
    assert [case.name for case in in_fp8] == [
        f"{name}-{size}-fp8"
        for name in ("hylo-1b", "qwen", "deepseek-h16", "deepseek-h128")
        for size in ("1x4k", "1x128k", "32x4k", "32x32k")
    ]
    cases = [case for case in mla_absorb.CASES.values() if case not in in_fp8]
    alone = [case for case in cases if case.scope == "attention"]
    even = [(case.H, case.R, case.E, case.B, case.S) for case in alone if not case.skewed]
    assert even == [(*dims, *size) for dims in DIMS for size in GRID]
    assert [(case.H, case.R, case.E, case.B) for case in alone if case.skewed] == [(*dims, 64) for dims in DIMS]
    steps = [(case.H, case.R, case.E, case.B, case.S, case.HK) for case in cases if case.scope == "step"]
    assert steps == [(*dims, B, 4096, 8) for dims in DIMS[:2] for B in (1, 32)]
    assert [case.shape["B"] for case in mla_absorb.EXTRA_CASES.values()] == [128] * 6
    assert {case.page for case in cases} == {64}
    assert {case.dtype for case in cases} == {torch.bfloat16}
    assert set(mla_absorb.PEERS) == {*FUSED, "torch"}


def test_skewed_lengths_are_log_uniform_and_always_the_same():
    case = mla_absorb.CASES["hylo-1b-64-skewed"]
    assert case.lengths == mla_absorb.CASES["deepseek-h128-64-skewed"].lengths
    ascending = sorted(case.lengths)
    assert (len(ascending), ascending[0], ascending[-1]) == (64, 100, 32768)
    growth = [b / a for a, b in itertools.pairwise(ascending)]
    assert growth == pytest.approx([327.68 ** (1 / 63)] * 63, rel=0.01)
    assert list(case.lengths) not in (ascending, ascending[::-1])
    assert case.shape["S"] == "skewed"


def test_work_by_hand():
    """The cost model's table: 320 bytes and 18,432 FLOP a cached token at 128+32, 1,152 and 278,528 at 128 heads."""
    hylo, deepseek = (mla_absorb.work(mla_absorb.CASES[f"{name}-32x4k"]) for name in ("hylo-1b", "deepseek-h128"))
    tokens = 32 * 4096
    assert hylo.bytes == tokens * 320 + 32 * 32 * (2 * 128 + 32) * 2
    assert hylo.flop == tokens * 18_432
    assert deepseek.bytes == tokens * 1152 + 32 * 128 * (2 * 512 + 64) * 2
    assert deepseek.flop == tokens * 278_528
    for name, row, queries in (("hylo-1b", 196, 32 * (2 * 128 + 32)), ("deepseek-h16", 656, 16 * (2 * 512 + 64))):
        fp8, wide = (mla_absorb.work(mla_absorb.CASES[f"{name}-32x4k{suffix}"]) for suffix in ("-fp8", ""))
        assert (fp8.bytes, fp8.flop) == (tokens * row + 32 * queries * 2, wide.flop)
    skewed = mla_absorb.CASES["qwen-64-skewed"]
    assert mla_absorb.work(skewed).bytes == sum(skewed.lengths) * 640 + 64 * 16 * (2 * 256 + 64) * 2
    step = mla_absorb.work(mla_absorb.CASES["hylo-1b-step-32"])
    of_sequence = 32 * (32 + 32 + 64) + 2 * 160 + 2 * 32  # q and o; the row in and out; cos and sin
    assert step.bytes == 2 * ((tokens - 32) * 160 + 8 * 128 * (32 + 64) + 32 * of_sequence)
    assert step.flop == tokens * 18_432 + 32 * 2 * 32 * 128 * (32 + 64)


def test_pages_are_shuffled_and_each_belongs_to_one_sequence(on_cpu):
    cache = mla_absorb.draw_cache(SKEWED, mla_absorb.seeded())
    counts = [-(-n // 64) for n in SKEWED.lengths]
    used = torch.cat([pages[:count] for pages, count in zip(cache.block_table, counts, strict=True)])
    assert sorted(used.tolist()) == list(range(sum(counts)))
    assert used.tolist() != sorted(used.tolist())
    assert len(cache.copies) == -(-700_000 // cache.copies[0].nbytes) > 1
    assert len({copy.data_ptr() for copy in cache.copies}) == len(cache.copies)
    for n, (length, slot) in enumerate(zip(SKEWED.lengths, cache.slots.tolist(), strict=True)):
        newest = cache.copies[1].flatten(0, 1)[slot]
        assert torch.equal(newest, cache.contiguous[1][n, length - 1])


def test_calls_take_turns_and_are_timed_in_whole_turns():
    order = []
    rotation = timing.Rotation([partial(order.append, i) for i in range(3)])
    for _ in range(7):
        rotation()
    assert order == [0, 1, 2, 0, 1, 2, 0]
    assert len(rotation) == 3
    assert timing.plan(10, seconds=1.0, turns=205) == (20, 205)
    assert timing.plan(10**5, seconds=1.0, turns=3) == (5, 3)


# Rows


@pytest.mark.parametrize("case", [TINY, SKEWED, DEEPSEEK], ids=["tiny", "skewed", "deepseek"])
def test_every_peer_of_the_attention_computes_the_same(on_cpu, libraries, case):
    (row,) = rows(case)
    assert (row["shape"], row["scope"], row["pass"]) == (case.shape, "attention", "decode")
    assert (row["tokens"], row["page"], row["host_us"]) == (sum(case.lengths), 64, None)
    assert list(row["peers"]) == [*FUSED, "torch"]
    missing = {name: entry["missing"] for name, entry in row["peers"].items() if "missing" in entry}
    only = {"flash_mla": "takes a latent of 512, a rope of 64 and pages of 64 only"}
    assert missing == ({} if case is DEEPSEEK else only)
    for name, entry in row["peers"].items():
        if name not in missing:
            assert entry["errors"].keys() == {"o"}
            assert entry["error"] < (2e-2 if name == "torch" else 3e-3), name
    assert row["error"] < 3e-3
    assert row["bytes_per_second"] == pytest.approx(row["bytes"] / 4e-6)
    assert row["peers"]["torch"]["flop_per_second"] == pytest.approx(row["flop"] / 12e-6)
    assert row["ratio"] == pytest.approx(3.0)


def test_rows_in_fp8_are_held_to_what_they_stand_for(on_cpu, libraries):
    """Ours reads the bytes; peers, and float64, have the same numbers."""
    attention = mla_absorb.our_attention("reference", mla_absorb.draw_cache(FP8, mla_absorb.seeded()))
    assert {(copy.dtype, copy.shape[-1]) for copy in attention.copies} == {(torch.uint8, 208)}
    (row,) = rows(FP8)
    assert (row["dtype"], row["state_dtype"]) == ("bf16", "fp8")
    assert row["error"] < 3e-3
    present = {name: entry["error"] for name, entry in row["peers"].items() if "missing" not in entry}
    assert present.keys() == {"flashinfer_fa3", "flashinfer_fa2", "fa3", "vllm_triton", "torch"}
    assert max(present.values()) < 2e-2
    (cuda,) = rows(FP8, [], ["cuda"])
    assert "not on a CUDA device" in cuda["missing"]


def test_every_peer_of_the_step_computes_the_same(on_cpu, libraries):
    for case in (STEP, replace(STEP, R=128, E=32, nope=32, v=64, B=1)):
        (row,) = rows(case)
        assert (row["scope"], row["pass"]) == ("step", "layer")
        assert row["host_us"] == (7.5 if case.B == 1 else None)
        assert set(row["errors"]) == {"o", "row"}
        assert row["error"] < 5e-3
        present = {name for name, entry in row["peers"].items() if "missing" not in entry}
        assert present == {"flashinfer_fa3", "flashinfer_fa2", "fa3", "vllm_triton", "torch"}
        assert all(row["peers"][name]["error"] < 2e-2 for name in present)


def test_a_step_that_writes_no_row_is_wrong(on_cpu, monkeypatch):
    monkeypatch.setattr(hylo_ops.fused, "mla_step", without_row(hylo_ops.fused.mla_step))
    with pytest.raises(AssertionError, match="step: error inf of row"):
        rows(STEP, [], ["cuda"])


def without_row(right):
    def step(*tensors, backend, **options):
        if backend == "reference":
            return right(*tensors, backend=backend, **options)
        *others, cache = tensors
        return right(*others, cache.clone(), backend="reference", **options)

    return step


@pytest.mark.parametrize("case", [TINY, STEP], ids=["attention", "step"])
def test_what_is_not_there_is_missing_with_its_reason(on_cpu, case):
    (row,) = rows(case, FUSED)
    assert list(row["peers"]) == FUSED
    assert all(entry["missing"] for entry in row["peers"].values())
    assert (row["best_peer"], row["ratio"], row["us"]) == (None, None, 20.0)
    command.show([row])


def test_our_backends_that_need_a_gpu_are_missing_with_their_reason(on_cpu):
    for case in (TINY, STEP):
        for row in rows(case, [], mla_absorb.BACKENDS):
            assert row["missing"]
            assert row["us"] is row["roofline"] is row["error"] is None


def test_a_wrong_result_of_ours_stops_before_the_clock(on_cpu, monkeypatch):
    right = hylo_ops.mla_absorb

    def doubled(*tensors, backend, **options):
        return right(*tensors, backend="reference", **options) * (2 if backend == "cuda" else 1)

    monkeypatch.setattr(hylo_ops, "mla_absorb", doubled)
    with pytest.raises(AssertionError, match=r"tiny: error 1.0e\+00 of o"):
        rows(TINY, [], ["cuda"])


def test_dims_that_a_library_has_no_kernel_for_are_named(libraries):
    def cache(R, E, pages=1):
        return peers.LatentCache(
            copies=(torch.empty(pages, 64, R + E, dtype=torch.bfloat16, device="meta"),),
            lengths=(64,),
            cache_seqlens=torch.tensor([64], dtype=torch.int32),
            block_table=torch.zeros(1, 1, dtype=torch.int32),
            H=2,
            R=R,
            E=E,
            scale=1.0,
        )

    for name, found, reason in (
        ("flashinfer_fa3", cache(160, 64), "its fa3 kernel does not take a latent of 160"),
        ("flashinfer_fa3", cache(384, 64), "its fa3 kernel does not take a latent of 384"),
        ("fa3", cache(160, 64), "has no kernel for keys of 224 and values of 160, nor a second query of 160"),
        ("vllm_triton", cache(512, 64, 58255), "computes page offsets in 32 bits"),
    ):
        with pytest.raises(Missing, match=reason):
            peers.FORMS[name](found)
