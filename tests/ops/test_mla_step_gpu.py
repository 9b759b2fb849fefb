"""The decode step of latent attention on a GPU: against float64, in graphs, around the dispatcher, again and again."""

import threading
from dataclasses import replace

import pytest
import torch

from hylo_ops.backend import choose
from hylo_ops.fused import cuda_mla, mla, mla_step
from hylo_ops.testing import within_budget
from tests.ops.mla_step_cases import (
    BF16,
    EMULATED,
    FP16,
    FP32,
    OPTIONAL,
    SCALE,
    TENSORS,
    Case,
    arguments,
    by_op,
    by_triton,
    check,
    composed,
    run_and_check,
    same_bits,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
ELSEWHERE = torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
only_hopper = pytest.mark.skipif(ELSEWHERE, reason="the CUDA kernels are for compute capability 9.0")

LENGTHS = (1500, 64, 1, 777)
HYLO_1B = Case(32, 8, 32, 128, 32, 64, LENGTHS, page=64)
HYLO_3B = Case(24, 8, 64, 128, 64, 128, LENGTHS, page=64)
QWEN = Case(16, 8, 64, 256, 64, 128, LENGTHS, page=64, scales=8)
DEEPSEEK = Case(16, 16, 128, 512, 64, 128, LENGTHS, page=64)
PUBLISHED = [HYLO_1B, HYLO_3B, QWEN, DEEPSEEK]
EACH = pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)


def lengths_of(batch, most=300):
    return tuple(1 + 37 * i % most for i in range(batch))


CASES = [
    *EMULATED,
    *PUBLISHED,
    *(
        replace(case, lengths=lengths_of(B), page=page)
        for case in PUBLISHED
        for B in (1, 2, 32, 67)
        for page in (None, 16)
    ),
    # Warps with several tiles of rows.
    *(replace(case, lengths=lengths_of(B, 20)) for case in (HYLO_1B, HYLO_3B) for B in (300, 700)),
    Case(8, 8, 16, 16, 0, 1056, (1, 2) * 8 + (3,), page=8, scales=4, dtype=FP16),
    *(replace(case, padding=(0, 2), angles=FP32, integers=torch.int64) for case in PUBLISHED),
    *(replace(case, dtype=FP16, shared=True, starts=(700, 3, 0, 776)) for case in PUBLISHED),
    *(Case(8, HK, nope, 64, 32, 32) for HK in (1, 2, 8) for nope in (16, 48, 112)),
    *(Case(8, 4, 32, R, E, v) for R, E, v in ((16, 0, 16), (80, 16, 208), (320, 64, 48), (448, 48, 64), (576, 64, 64))),
    Case(128, 128, 128, 512, 64, 128, (300, 5)),
    Case(12, 4, 32, 48, 32, 32, scales=4, spare=5, padding=(0, 1, 2, 3)),
]


@only_hopper
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case):
    run_and_check(case, "cuda")


@EACH
def test_the_composition_agrees_with_float64(case):
    run_and_check(replace(case, padding=(1,)), "cuda", composed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_agrees_with_float64(case):
    run_and_check(case, "cuda", by_triton)


@EACH
def test_triton_in_fp32_and_over_a_cache_of_16_bits(case):
    run_and_check(replace(case, dtype=FP32, angles=FP32), "cuda", by_triton)
    x = replace(case, dtype=FP32, angles=FP32).inputs("cuda")
    x["kv_cache"] = x["kv_cache"].to(BF16)
    expected = by_op({**x, "kv_cache": x["kv_cache"].clone()}, "reference")
    torch.testing.assert_close(by_triton(x), expected, rtol=1e-4, atol=1e-4)


@EACH
def test_triton_runs_what_the_cuda_kernels_refuse(case):
    """They take 16 bits only."""
    x = replace(case, dtype=FP32, angles=FP32).inputs("cuda")
    inputs = {name: x[name] for name in (*TENSORS, *OPTIONAL, "key_scale")} | {"scale": SCALE}
    assert choose("mla_step", mla.BACKENDS, None, inputs).name == "triton"


@only_hopper
@EACH
def test_a_graph_follows_positions_lengths_and_pages(case):
    case = replace(case, lengths=(1500,) * 4)
    x = case.inputs("cuda")
    start = x["kv_cache"].nan_to_num(0.5)
    x["kv_cache"].copy_(start)
    by_op(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = by_op(x)
    for lengths, padding in (((1500, 1, 64, 65), ()), ((9, 1000, 3, 1024), (1, 3)), ((1, 1, 1, 1), (0, 1, 2, 3))):
        position = [-1 if n in padding else length - 1 for n, length in enumerate(lengths)]
        x["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        x["position"].copy_(torch.tensor(position, dtype=torch.int32))
        x["block_table"].copy_(x["block_table"].roll(1, 0))
        x["kv_cache"].copy_(start)
        graph.replay()
        check(replace(case, lengths=lengths, padding=padding), x | {"kv_cache": start}, o, x["kv_cache"])


@only_hopper
@EACH
@pytest.mark.parametrize("B", [1, 40])
def test_hundreds_of_steps_in_a_row_are_equal(case, B):
    """Kernels begin before those ahead of them have ended, also those of the step before."""
    x = replace(case, lengths=lengths_of(B, 900)).inputs("cuda")
    expected = by_op(x)
    after = x["kv_cache"].clone()
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        differ |= (by_op(x) != expected).any()
    assert not differ
    assert same_bits(x["kv_cache"], after)


@only_hopper
@EACH
def test_it_sees_what_the_kernel_ahead_has_just_written(case):
    """Weights, queries and rows that are still on their way when it is launched."""
    x, names = case.inputs("cuda"), ("w_uk", "w_uv", "q_nope", "q_rope", "kv_new")
    expected = by_op(x)
    final = {name: x[name].clone() for name in names}
    for last in names:
        for name in names:
            x[name].zero_()
        by_op(x)
        torch.cuda._sleep(1_000_000)
        for name in sorted(names, key=lambda name: name == last):
            x[name].copy_(final[name])
        assert torch.equal(by_op(x), expected), last


@only_hopper
@EACH
def test_each_token_is_there_for_the_next(case):
    """A walk from nothing: all that a step wrote is read by those after it."""
    tokens, ours = 70, replace(case, lengths=(70, 70)).inputs("cuda")
    ours["kv_cache"].fill_(0.25)
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in ours.items()}
    plain = {k: v.clone() if torch.is_tensor(v) else v for k, v in ours.items()}
    generator = torch.Generator(device="cuda").manual_seed(1)
    for t in range(tokens):
        for name in ("q_nope", "q_rope", "kv_new"):
            fresh = torch.randn(ours[name].shape, generator=generator, device="cuda").to(case.dtype)
            for side in (ours, exact, plain):
                side[name] = fresh.to(side[name].dtype)
        for side in (ours, exact, plain):
            side["position"] = torch.full_like(ours["position"], t)
            side["cache_seqlens"] = side["position"] + 1
        o = by_op(ours)
        o_exact, o_plain = mla_step(**exact, scale=SCALE, backend="reference"), composed(plain)
    within_budget(o, o_plain, o_exact, "o")
    within_budget(ours["kv_cache"][..., : case.R], plain["kv_cache"][..., : case.R], exact["kv_cache"][..., : case.R])


@only_hopper
@EACH
def test_it_runs_on_the_callers_stream_without_synchronising(case):
    x, stream = case.inputs("cuda"), torch.cuda.Stream()
    expected, right = by_op(x), x["q_nope"].clone()
    x["q_nope"].zero_()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # about 50 ms: a launch elsewhere would not wait, and meet zeros
            x["q_nope"].copy_(right)
            o = by_op(x)
        assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(o, expected)


@only_hopper
def test_steps_of_several_sizes_and_a_graph_take_turns():
    """On one stream they work in the same memory, but for the graph, which owns its."""
    cases = [replace(HYLO_1B, lengths=(9000,)), replace(DEEPSEEK, lengths=(900,) * 40), QWEN]
    inputs = [case.inputs("cuda") for case in cases]
    expected = [by_op(x) for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = by_op(inputs[0])
    for _ in range(3):
        for x, o in zip(inputs, expected, strict=True):
            graph.replay()
            assert torch.equal(by_op(x), o)
            assert torch.equal(replayed, expected[0])


@only_hopper
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_results_lie_where_the_inputs_do():
    """Not on the current device."""
    for device in (0, 1):
        x = HYLO_1B.inputs(f"cuda:{device}")
        o = by_op(x)
        assert o.device == x["q_nope"].device
        assert torch.equal(o.cpu(), by_op(HYLO_1B.inputs("cuda:0")).cpu())


def test_the_composition_does_not_synchronise():
    x = HYLO_1B.inputs("cuda")
    composed(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        composed(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_hopper
def test_streams_and_threads_do_not_share_what_they_work_on():
    x = replace(HYLO_1B, lengths=(9000, 64, 1, 777)).inputs("cuda")
    expected, wrong = by_op(x), []
    torch.cuda.synchronize()

    def work():
        mine = x | {"kv_cache": x["kv_cache"].clone()}
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            wrong.extend(True for _ in range(50) if not torch.equal(by_op(mine), expected))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@only_hopper
@EACH
def test_the_default_goes_around_the_dispatcher(case, monkeypatch):
    seen, direct = [], cuda_mla.direct()

    def noted(*given):
        seen.append(direct(*given))
        return seen[-1]

    monkeypatch.setattr(cuda_mla, "direct", lambda: noted)
    assert mla_step(**case.inputs("cuda"), scale=SCALE) is seen[0]


@only_hopper
@EACH
@pytest.mark.parametrize("cubin_source", ["packaged", "nvrtc"])
def test_both_sources_of_device_code(case, cubin_source):
    x = case.inputs("cuda")
    expected = by_op(x)
    assert torch.equal(cuda_mla.forward(*arguments(x), SCALE, x["key_scale"], cubin_source=cubin_source), expected)


@only_hopper
def test_a_compiled_call_equals_the_direct_one():
    x = HYLO_1B.inputs("cuda")
    expected = by_op(x)
    assert torch.equal(torch.compile(mla_step, fullgraph=True)(**x, scale=SCALE, backend="cuda"), expected)


@only_hopper
def test_a_position_beyond_the_cache_is_not_written():
    x = replace(HYLO_1B, page=None, lengths=(64, 64)).inputs("cuda")
    x["kv_cache"].fill_(0.5)
    x["position"].fill_(64)
    by_op(x)
    assert (x["kv_cache"] == 0.5).all()


@only_hopper
def test_a_pool_beyond_two_billion_elements():
    x = replace(HYLO_1B, lengths=(1000,)).inputs("cuda")
    small = x["kv_cache"]
    pages = 2**31 // small[0].numel() + 64
    if torch.cuda.mem_get_info()[0] < 3 * pages * small[0].numel():
        pytest.skip(f"{torch.cuda.mem_get_info()[0]} bytes of memory are free")
    pool = torch.empty(pages, *small.shape[1:], dtype=BF16, device="cuda")
    pool[-len(small) :] = small
    o = by_op(x | {"kv_cache": pool, "block_table": x["block_table"] + pages - len(small)})
    assert torch.equal(o, by_op(x))
    assert same_bits(pool[-len(small) :], small)


@only_hopper
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"w_uk": x["w_uk"].float()}, "are not of one dtype"),
        (lambda x: {"kv_cache": x["kv_cache"].float()}, "are not of one dtype"),
        (lambda x: {"w_uv": x["w_uv"].mT.contiguous().mT}, "the last dim of w_uv is not contiguous"),
        (lambda x: {"kv_new": torch.stack([x["kv_new"]] * 2, -1)[..., 0]}, "the last dim of q_rope or of kv_new"),
        (lambda x: {"kv_cache": x["kv_cache"][:, :4]}, "pages of 4 tokens are not of a multiple of 8"),
    ],
)
def test_what_it_refuses_the_composition_takes(change, reason):
    x = replace(HYLO_1B, lengths=(1, 2), page=8).inputs("cuda")
    changed = x | change(x)
    with pytest.raises(NotImplementedError, match=reason):
        by_op(changed)
    expected = mla_step(**changed | {"kv_cache": changed["kv_cache"].clone()}, scale=SCALE, backend="composed")
    assert torch.equal(mla_step(**changed, scale=SCALE), expected)
