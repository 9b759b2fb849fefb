"""Absorbed latent attention on a GPU, its CUDA and its Triton backend: against float64, in graphs, again and again."""

import threading
from dataclasses import replace

import pytest
import torch

from hylo_ops import mla_absorb
from hylo_ops.backend import choose
from hylo_ops.mla_absorb import cuda, op, triton
from hylo_ops.testing import relative_error
from tests.ops.mla_absorb_cuda_cases import (
    BENCHMARK,
    BF16,
    CASES,
    FP16,
    NAMES,
    SCALE,
    Case,
    by_steps,
    check,
    run_and_check,
    with_one_page,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
needs_sm_90 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the CUDA kernels are for compute capability 9.0",
)
BACKENDS = ["cuda", "triton"]
LENGTHS = (1500, 64, 0, 777)
PUBLISHED = [Case(R, E, H, LENGTHS, HK=HK) for R, E, H, HK in ((128, 32, 32, 0), (256, 64, 16, 8), (512, 64, 16, 0))]
PUBLISHED += [replace(case, fp8=True) for case in PUBLISHED]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CUDA kernels are for compute capability 9.0")
    return request.param


def by_op(backend):
    """The public function; a spread, which only the CUDA backend has, goes to that."""

    def attend(x, case):
        if backend == "cuda" and case.spread is not None:
            return cuda.forward(*(x[name] for name in NAMES), SCALE, case.causal, case.fixed_split, spread=case.spread)
        options = {"causal": case.causal, "fixed_split": case.fixed_split, "backend": backend}
        return mla_absorb(**x, scale=SCALE, return_lse=True, **options)

    return attend


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case, backend):
    run_and_check(case, "cuda", by_op(backend))


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_a_graph_follows_the_lengths(case, backend):
    attend, x = by_op(backend), replace(case, lengths=(1500,) * 4).inputs("cuda")
    attend(x, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attend(x, case)
    for lengths in ((1500, 1500, 1500, 1500), (0, 5, 64, 900), (1, 0, 0, 0), (1023, 1024, 1025, 65)):
        x["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        check(x, case, o, lse)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_the_same_bits_every_time(case, backend):
    """Many launches in a row, with others between them: whichever block comes last, sums are in one order."""
    attend, case = by_op(backend), replace(case, lengths=(9000, 64, 0, 777))
    x = case.inputs("cuda")
    o, lse = attend(x, case)
    other = replace(case, lengths=(4000,) * 9)
    y = other.inputs("cuda")
    for _ in range(50):
        again, lse_again = attend(x, case)
        attend(y, other)
        assert torch.equal(again, o)
        assert torch.equal(lse_again, lse)


def occupy(blocks: int) -> None:
    """Keeps so many multiprocessors busy for some milliseconds, on the current stream: each block fills one."""
    tokens = 1 << 24
    x = Case(512, 64, 64, (64,)).inputs("cuda")  # one tile of query rows, one page again and again
    x["cache_seqlens"].fill_(tokens)
    x["block_table"] = x["block_table"][:, :1].expand(1, tokens // 64).contiguous()
    cuda.forward(*x.values(), SCALE, True, False, spread=(1, -(-tokens // 64 // blocks)))


@needs_sm_90
@pytest.mark.parametrize("spread", [(1, 1), (2, 2), (8, 8)], ids=str)
@pytest.mark.parametrize("dims", [(512, 64, 128), (512, 64, 64), (128, 32, 32), (256, 64, 16)], ids=str)
def test_blocks_that_merge_together(dims, spread):
    """The same bits, whether they wait for each other or, as others cannot begin, in vain."""
    case = Case(*dims, (9000, 64, 0, 777, 4000), spread=spread)
    attend, x = by_op("cuda"), case.inputs("cuda")
    o, lse = attend(x, case)
    check(x, case, o, lse)
    aside = torch.cuda.Stream()
    for i in range(200):
        if i % 40 == 20:
            with torch.cuda.stream(aside):
                occupy((60, 100, 131)[i // 40 % 3])
        again, lse_again = attend(x, case)
        assert torch.equal(again, o)
        assert torch.equal(lse_again, lse)


def test_streams_do_not_share_what_they_count_on(backend):
    case = Case(128, 32, 32, (9000, 64, 0, 777))
    attend, x = by_op(backend), case.inputs("cuda")
    expected, _ = attend(x, case)
    torch.cuda.synchronize()
    wrong = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(attend(x, case)[0], expected):
                    wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_pool_beyond_two_billion_elements(dtype, backend):
    """Only its last pages are used."""
    free = torch.cuda.mem_get_info()[0]
    page, row = 64, 160
    pages = 2**31 // (page * row) + 64
    if free < 1.5 * pages * page * row * 2:
        pytest.skip(f"{free} bytes of memory are free")
    case = Case(128, 32, 32, (1000,), dtype=dtype)
    x = case.inputs("cuda")
    small = x["kv_cache"]
    pool = torch.empty(pages, page, row, dtype=dtype, device="cuda")
    pool[-len(small) :] = small
    o, lse = by_op(backend)({**x, "kv_cache": pool, "block_table": x["block_table"] + pages - len(small)}, case)
    check(x, case, o, lse)


@pytest.mark.parametrize("HK", [0, 8])
def test_what_stands_beside_the_cache_and_between_its_pages(HK, backend):
    """Every second page of a pool with longer rows, queries side by side in one projection."""
    case = Case(128, 64, 24, LENGTHS, HK=HK)
    x = case.inputs("cuda")
    cache = x["kv_cache"]
    pages, page, row = cache.shape
    pool = torch.full((2 * pages, page, row + 24), torch.nan, dtype=cache.dtype, device="cuda")
    pool[1::2, :, :row] = cache
    view = pool[1::2]
    x |= {"kv_cache": view, "key_scale": view[..., 192 : 192 + HK] if HK else None}
    run_x = by_op(backend)(x, case)
    check(x, case, *run_x)


@needs_sm_90
@pytest.mark.parametrize("case", BENCHMARK, ids=lambda case: case.name)
def test_without_a_name_every_case_of_the_benchmark_is_the_cuda_kernels(case):
    """With and without torch's dispatcher; and by name Triton takes it, too."""
    x = with_one_page(case, "cuda")
    assert choose("mla_absorb", op.BACKENDS, None, x).name == "cuda"
    assert isinstance(cuda.direct()(*x.values(), SCALE, True, False, False), torch.Tensor)
    assert triton.why_not(**x) is None


def contract(**changes):
    """A case of the widths of HyLo 1B, with something changed that the op allows."""
    return Case(128, 32, 32, LENGTHS, **changes)


CONTRACT = [
    *(contract(page=page) for page in (None, 8, 16, 64, 256)),
    *(contract(T=T, causal=causal) for T in (1, 3) for causal in (True, False)),
    *(contract(dtype=dtype, integers=integers) for dtype in (BF16, FP16) for integers in (torch.int32, torch.int64)),
    *(contract(HK=HK) for HK in (1, 8, 16)),
    contract(starts=(70, 0, 0, 64)),
    contract(fixed_split=True),
    *(
        contract(page=page, HK=HK, dtype=dtype, fp8=True)
        for page in (None, 8, 64)
        for HK, dtype in ((0, BF16), (8, FP16))
    ),
]


@pytest.mark.parametrize("case", CONTRACT, ids=lambda case: case.name)
def test_all_that_the_op_allows_is_taken(case, backend):
    why_not = cuda.why_not if backend == "cuda" else triton.why_not
    assert why_not(**case.inputs("cuda")) is None


@needs_sm_90
@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda x: {name: x[name].float() for name in ("q_nope", "q_rope", "kv_cache")}, "triton"),
        (lambda x: {name: x[name].double() for name in ("q_nope", "q_rope", "kv_cache")}, "reference"),
        (lambda x: {"key_scale": torch.ones(*x["kv_cache"].shape[:2], 4, dtype=BF16, device="cuda")}, "triton"),
        (lambda x: {}, "cuda"),
    ],
    ids=["fp32", "fp64", "key scales of their own", "bf16"],
)
def test_what_the_first_backend_refuses_the_next_one_takes(change, first):
    x = contract().inputs("cuda")
    x |= change(x)
    x["kv_cache"] = x["kv_cache"].nan_to_num()
    assert torch.equal(mla_absorb(**x, scale=SCALE), mla_absorb(**x, scale=SCALE, backend=first))


@needs_sm_90
def test_direct_gives_the_same_bits():
    for case in PUBLISHED:
        x = case.inputs("cuda")
        inputs = [x[name] for name in NAMES]
        o, lse = cuda.direct()(*inputs, SCALE, True, False, True)
        alone = cuda.direct()(*inputs, SCALE, True, False, False)
        expected = cuda.forward(*inputs, SCALE, True, False)
        assert torch.equal(o, expected[0])
        assert torch.equal(lse, expected[1])
        assert torch.equal(alone, o)


@needs_sm_90
def test_a_workspace_follows_what_launches_need():
    """Small, large and small again on one stream, and graphs between them, that own theirs."""
    cases = [replace(PUBLISHED[0], lengths=lengths) for lengths in ((9000,), (9000,) * 40, (9000, 64, 0))]
    inputs = [[case.inputs("cuda")[name] for name in NAMES] for case in cases]
    expected = [cuda.forward(*x, SCALE, True, False)[0] for x in inputs]
    graphs = []
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graphs.append((graph, cuda.forward(*x, SCALE, True, False)[0]))
    for _ in range(3):
        for x, (graph, replayed), o in zip(inputs, graphs, expected, strict=True):
            graph.replay()
            assert torch.equal(cuda.forward(*x, SCALE, True, False)[0], o)
            assert torch.equal(replayed, o)


def test_direct_asks_for_the_dispatcher_where_a_gradient_is_wanted():
    x = PUBLISHED[0].inputs("cuda")
    x["q_nope"].requires_grad_()
    assert isinstance(cuda.direct()(*(x[name] for name in NAMES), SCALE, True, False, True), str)


def test_gradients(backend):
    """They are the reference's, through either backend's forward."""
    case = Case(48, 32, 8, (70, 3))
    x = case.inputs("cuda")
    x["kv_cache"] = x["kv_cache"].nan_to_num()
    x["q_nope"].requires_grad_()
    mla_absorb(**x, scale=SCALE, backend=backend).float().sum().backward()
    ours, x["q_nope"].grad = x["q_nope"].grad, None
    by_steps(x, case)[0].float().sum().backward()
    assert relative_error(ours, x["q_nope"].grad) < 0.05
