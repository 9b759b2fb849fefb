"""Absorbed latent attention over rows in fp8 on a GPU: Triton against float64 over what the rows stand for.

The CUDA kernels are tested over them in test_mla_absorb_gpu.py.
"""

import pytest
import torch

from hylo_ops import fp8_row_bytes, mla_absorb, quantize_kv_cache
from hylo_ops.backend import choose
from hylo_ops.mla_absorb import cuda, op, reference, triton_decode
from hylo_ops.testing import within_budget
from tests.triton.mla_absorb_cases import BF16, FP16, MODELS_FP8, SMALL_FP8, Case, dequantized, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMES = ("q_nope", "q_rope", "kv_cache", "cache_seqlens", "cache_starts", "block_table", "key_scale")
# All widths of the contract, a few lengths; what stands in memory beside the rows is NaN.
WIDTHS = [
    Case((700, 3, 0, 129), H=16, R=R, E=E, page=64, fp8=True, dtype=dtype)
    for R in (16, 48, 64, 80, 96, 128, 144, 160, 192, 256, 320, 384, 400, 448, 480, 512, 576)
    for E, dtype in ((0, BF16), (32, FP16), (64, BF16), (128, FP16))
]
PUBLISHED = [Case((1500, 64, 0, 777), H=H, R=R, E=E, page=64, fp8=True) for H, R, E in ((32, 128, 32), (16, 512, 64))]


def on_gpu(case, seed=0):
    inputs = make(case, seed)
    scales = inputs["key_scale"]
    moved = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
    return moved | {"key_scale": None if scales is None else scales.cuda()}


def run(inputs, case, backend="triton"):
    options = {"causal": case.causal, "fixed_split": case.fixed_split, "return_lse": True, "backend": backend}
    return mla_absorb(**inputs, **options)


def by_steps(inputs, case, dtype):
    table = inputs["block_table"]
    clean = {"block_table": None if table is None else table.clamp(0, len(inputs["kv_cache"]) - 1)}
    rows = dequantized(inputs | clean, case, dtype)
    return reference.step_by_step(*(rows[name] for name in NAMES), scale=inputs["scale"], causal=case.causal)


def check(inputs, case, o, lse):
    """As near to float64 as the definition is in 16 bits over rows that were rounded to them."""
    expected, eager = by_steps(inputs, case, torch.float64), by_steps(inputs, case, case.dtype)
    seen = expected[1] > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert not o[~seen].any()
    within_budget(o[seen], eager[0][seen], expected[0][seen], "o")
    torch.testing.assert_close(lse[seen].double(), expected[1][seen], rtol=0, atol=1e-3)


@pytest.mark.parametrize("case", [*SMALL_FP8, *MODELS_FP8, *WIDTHS], ids=str)
def test_agrees_with_float64(case):
    """Twice: the same bits."""
    inputs = on_gpu(case)
    o, lse = run(inputs, case)
    assert all(map(torch.equal, (o, lse), run(inputs, case)))
    check(inputs, case, o, lse)


@pytest.mark.parametrize("case", [SMALL_FP8[3], SMALL_FP8[4], *PUBLISHED], ids=str)
def test_without_a_conversion_of_the_gpu_s_own(case, monkeypatch):
    """What GPUs before 8.9 run: the same numbers go into the products, so the same bits come out."""
    inputs = on_gpu(case)
    expected = run(inputs, case)
    triton_decode._plan.cache_clear()
    monkeypatch.setattr(triton_decode, "_has_e4m3", lambda: False)
    try:
        assert all(map(torch.equal, expected, run(inputs, case)))
    finally:
        triton_decode._plan.cache_clear()


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e3])
def test_weights_keep_their_bits_in_fp16(factor):
    """Many tokens of about the same weight, beside one that has most of it: times a scale they are far below 1."""
    case = Case((4096,), H=16, R=128, E=0, fp8=True, dtype=FP16)
    inputs = on_gpu(case)
    latents = torch.randn(1, 4096, 128, generator=torch.Generator().manual_seed(0)).abs().cuda()
    queries = torch.zeros_like(inputs["q_nope"])
    queries[..., 0] = 1
    latents[..., 0] = 0
    latents[:, 7, 0] = 8
    inputs |= {"kv_cache": quantize_kv_cache(latents * factor, latent_rank=128, dtype=FP16)}
    inputs |= {"q_nope": (queries / factor).half() if factor <= 1 else queries, "scale": 1.0 if factor <= 1 else 1e-3}
    check(inputs, case, *run(inputs, case))


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_a_graph_follows_the_lengths(case):
    inputs = on_gpu(Case((1500,) * 4, H=case.H, R=case.R, E=case.E, page=64, fp8=True))
    run(inputs, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = run(inputs, case)
    for lengths in ((1500, 1500, 1500, 1500), (0, 5, 64, 900), (1, 0, 0, 0), (1023, 1024, 1025, 65)):
        inputs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        check(inputs, case, o, lse)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the CUDA kernels are for compute capability 9.0",
)
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_without_a_name_it_is_the_cuda_kernels(case):
    """With and without torch's dispatcher, of bytes and of e4m3."""
    inputs = on_gpu(case)
    tensors = [inputs[name] for name in NAMES]
    assert choose("mla_absorb", op.BACKENDS, None, dict(zip(NAMES, tensors, strict=True))).name == "cuda"
    expected = run(inputs, case, "cuda")
    for stored in (torch.uint8, torch.float8_e4m3fn):
        tensors[2] = inputs["kv_cache"].view(stored)
        found = mla_absorb(**inputs | {"kv_cache": tensors[2]}, return_lse=True)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, cuda.direct()(*tensors, inputs["scale"], True, False, True), expected))


def test_a_pool_beyond_two_billion_bytes():
    """Only its last pages are used."""
    case = PUBLISHED[0]
    inputs = on_gpu(case)
    row, small = fp8_row_bytes(case.R, case.E), inputs["kv_cache"]
    pages = 2**31 // (64 * row) + 64
    if torch.cuda.mem_get_info()[0] < 1.5 * pages * 64 * row:
        pytest.skip("not enough memory is free")
    pool = torch.empty(pages, 64, row, dtype=torch.uint8, device="cuda")
    pool[-len(small) :] = small
    expected = run(inputs, case)
    table = torch.where(inputs["block_table"] < len(small), inputs["block_table"] + pages - len(small), 2**31 - 1)
    assert all(map(torch.equal, expected, run(inputs | {"kv_cache": pool, "block_table": table}, case)))


def test_gradients_of_queries():
    case = Case((70, 3), H=8, R=160, E=32, fp8=True)
    inputs = on_gpu(case)
    inputs["q_nope"].requires_grad_()

    def gradient(backend):
        o, _ = run(inputs, case, backend)
        return torch.autograd.grad(o.float().sum(), inputs["q_nope"])[0]

    assert torch.equal(gradient("triton"), gradient("reference"))
