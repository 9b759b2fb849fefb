"""mla_prefill on a GPU: that cuDNN runs, against float64, memory, 2M tokens, 64-bit offsets, no synchronisation."""

import math

import pytest
import torch

from hylo_ops import mla_absorb, mla_prefill
from hylo_ops.mla_prefill import engines
from hylo_ops.testing import cast, within_budget
from tests.ops.test_mla_prefill import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
HYLO_1B = {"H": 32, "HK": 8, "N": 32, "E": 32, "R": 128, "V": 64}
HYLO_3B = {"H": 24, "HK": 8, "N": 64, "E": 64, "R": 128, "V": 128}
HYLO_QWEN = {"H": 16, "HK": 8, "N": 64, "E": 64, "R": 256, "V": 128}
MINICPM = {"H": 40, "HK": 40, "N": 64, "E": 32, "R": 256, "V": 64}  # unequal widths, 96 and 64
DEEPSEEK = {"H": 16, "HK": 16, "N": 128, "E": 64, "R": 512, "V": 128}  # 192 and 128, of 8 ranks
DIMS = {"1b": HYLO_1B, "3b": HYLO_3B, "qwen": HYLO_QWEN, "minicpm": MINICPM, "deepseek": DEEPSEEK}


def inputs(dims, lengths, T, page=64, dtype=BF16, scaled=False):
    """On the GPU; the key scales, where there are any, are positive and stand in the rows."""
    x = make(lengths=lengths, T=T, page=page, dtype=torch.float32, **dims)
    x["kv_cache"][..., dims["R"] + dims["E"] :].abs_()
    x = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in cast(x, dtype).items()}
    x["key_scale"] = x["kv_cache"][..., dims["R"] + dims["E"] :] if scaled else None
    return x


def scale(dims):
    return (dims["N"] + dims["E"]) ** -0.5


def run(x, dims, slice_tokens=1024, backend=None):
    return mla_prefill(**x, scale=scale(dims), slice_tokens=slice_tokens, return_lse=True, backend=backend)


def eager(x, dims):
    """Expanded attention of each sequence by PyTorch's operators in the inputs' dtype, as a model would write it."""
    outputs = []
    for n, length in enumerate(x["lengths"]):
        pages = x["block_table"][n, : -(-length // x["kv_cache"].shape[1])].long()
        rows = x["kv_cache"][pages].flatten(0, 1)[:length]
        latent, rope, scales = rows.tensor_split([dims["R"], dims["R"] + dims["E"]], dim=-1)
        k = torch.einsum("sr,gnr->gsn", latent, x["w_uk"])
        k, v = torch.cat([k, rope.expand(len(k), -1, -1)], dim=-1), torch.einsum("sr,gvr->gsv", latent, x["w_uv"])
        if x["key_scale"] is not None:
            k = k * scales.mT[..., None]
        k, v = (t.repeat_interleave(dims["H"] // dims["HK"], 0) for t in (k, v))
        q = torch.cat([x["q_nope"][n], x["q_rope"][n]], dim=-1).transpose(0, 1)
        unseen = torch.ones(q.shape[1], length, dtype=torch.bool, device="cuda").triu(length - q.shape[1] + 1)
        scores = (scale(dims) * (q @ k.mT)).float().masked_fill(unseen, -torch.inf)
        outputs.append(((scores.softmax(-1).to(q.dtype) @ v).transpose(0, 1), scores.logsumexp(-1).mT))
    return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """Which engine attended to each slice."""
    names = []
    for name in ("cudnn", "eager"):
        engine = getattr(engines, name)
        monkeypatch.setattr(
            engines, name, lambda *args, engine=engine, name=name: (names.append(name), engine(*args))[1]
        )
    return names


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", DIMS)
def test_cudnn_agrees_with_float64(name, dtype, calls):
    """Slices before the chunk, three of the chunk, heads that share keys, both kinds of widths, key scales of Qwen."""
    dims = DIMS[name]
    x = inputs(dims, (2500, 1100), 600, dtype=dtype, scaled=name == "qwen")
    o, lse = run(x, dims, slice_tokens=256)
    assert set(calls) == {"cudnn"}
    exact, theirs = run(cast(x, torch.float64), dims, backend="reference"), eager(x, dims)
    within_budget(o, theirs[0], exact[0], "o")
    within_budget(lse, theirs[1], exact[1], "lse")


@pytest.mark.parametrize("T", [1, 2, 63, 300])
@pytest.mark.parametrize("page", [None, 64])
def test_lengths_that_no_tile_divides(T, page):
    x = inputs(HYLO_1B, (1025, 300, 777), T, page)
    exact = run(cast(x, torch.float64), HYLO_1B, backend="reference")
    o, lse = run(x, HYLO_1B, slice_tokens=333)
    torch.testing.assert_close(o.double(), exact[0], rtol=0.02, atol=0.01)
    torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cudnn_refuses_runs_eagerly(dtype, calls):
    x = inputs(HYLO_1B, (700, 300), 100, dtype=dtype)
    o, lse = run(x, HYLO_1B, slice_tokens=128)
    assert set(calls) == {"eager"}
    exact = run(cast(x, torch.float64), HYLO_1B, backend="reference")
    atol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close((o.double(), lse.double()), exact, rtol=0, atol=atol)


def test_the_device_is_not_waited_for():
    x = inputs(HYLO_1B, (3000, 900), 200)
    run(x, HYLO_1B)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x, HYLO_1B)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def one_page_again_and_again(tokens):
    """A context of any length that takes no memory: its softmax is the page's, its sum of exponentials grows."""
    x = inputs(HYLO_1B, (4096,), 1, page=4096)
    return x, {**x, "block_table": x["block_table"].expand(1, tokens // 4096), "lengths": [tokens]}


def test_memory_does_not_grow_with_the_context():
    peaks = []
    for tokens in (2**17, 2**20):
        _, x = one_page_again_and_again(tokens)
        run(x, HYLO_1B, slice_tokens=8192)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(x, HYLO_1B, slice_tokens=8192)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 1.1 * peaks[0]  # the allocator's blocks differ a little, whichever was free


def test_two_million_tokens():
    x, long = one_page_again_and_again(2**21)
    (o, lse), (o_long, lse_long) = run(x, HYLO_1B), run(long, HYLO_1B, slice_tokens=32768)
    torch.testing.assert_close(o_long, o, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(lse_long, lse + 9 * math.log(2), rtol=0, atol=2e-3)


def test_equals_absorbed_attention_over_two_million_tokens():
    """A contiguous cache of 2M rows, and a chunk of 300."""
    dims, x = HYLO_1B, inputs(HYLO_1B, (512,), 300, page=None)
    x["kv_cache"] = torch.randn(1, 2**21, 160, dtype=BF16, device="cuda", generator=torch.Generator("cuda"))
    x["lengths"] = [2**21]
    o, lse = run(x, dims, slice_tokens=32768)
    w_uk, w_uv = (x[name].repeat_interleave(4, 0) for name in ("w_uk", "w_uv"))
    latent, expected_lse = mla_absorb(
        torch.einsum("bthn,hnr->bthr", x["q_nope"], w_uk),
        x["q_rope"],
        x["kv_cache"],
        cache_seqlens=torch.tensor([2**21], device="cuda"),
        scale=scale(dims),
        return_lse=True,
    )
    expected = torch.einsum("bthr,hvr->bthv", latent, w_uv)
    assert (o - expected).float().norm() < 0.02 * expected.float().norm()
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=0.02)


def test_a_pool_beyond_two_billion_elements():
    """Only its last pages are used."""
    x = inputs(HYLO_1B, (1000,), 100)
    small = x["kv_cache"]
    row, pages = small.shape[2], 2**31 // (64 * small.shape[2]) + len(small)
    if torch.cuda.mem_get_info()[0] < 3 * pages * 64 * row:
        pytest.skip("needs 6 GB of free memory")
    pool = torch.empty(pages, 64, row, dtype=BF16, device="cuda")
    pool[-len(small) :] = small
    far = run({**x, "kv_cache": pool, "block_table": x["block_table"] + (pages - len(small))}, HYLO_1B)
    for one, other in zip(far, run(x, HYLO_1B), strict=True):
        assert torch.equal(one, other)
