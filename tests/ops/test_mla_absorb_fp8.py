"""A latent cache in fp8: its rows byte by byte, what quantizing costs, and the op over it against rows dequantized."""

import itertools

import pytest
import torch

from hylo_ops import dequantize_kv_cache, fp8_row_bytes, fp8_row_parts, mla_absorb, quantize_kv_cache
from hylo_ops.testing import gradients, relative_error
from tests.triton.mla_absorb_cases import BF16, FP16, FP32, SMALL_FP8, Case, dequantized, key_scales, make

FP8, FP64 = torch.float8_e4m3fn, torch.float64
SIZES = [(512, 64, 0), (128, 32, 0), (128, 64, 8), (256, 64, 0), (160, 64, 3), (96, 0, 0), (6, 2, 2), (130, 0, 1)]


def drawn(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(inputs, case, **options):
    return mla_absorb(**inputs, causal=case.causal, fixed_split=case.fixed_split, return_lse=True, **options)


# Rows


def test_bytes_of_a_row():
    """FlashMLA's 656 at its dims; each part fills whole units of 16 bytes."""
    assert fp8_row_bytes(512, 64) == 512 + 4 * 4 + 2 * 64 == 656
    assert fp8_row_bytes(128, 32) == 128 + 16 + 2 * 32
    assert fp8_row_bytes(128, 32, 8) == 128 + 16 + 2 * 40
    assert fp8_row_bytes(640, 0) == 640 + 32
    assert fp8_row_bytes(6, 2, 2) == 16 + 16 + 16
    assert all(fp8_row_bytes(*size) % 16 == 0 for size in itertools.product((1, 100, 129, 513), (0, 1, 33), (0, 5)))


def test_rows_of_flash_mla_are_read_byte_by_byte():
    """What FlashMLA's README says, put together from bytes, with no function of ours."""
    codes = torch.randint(0, 0x7F, (3, 5, 512), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale, rope = drawn(3, 5, 4).abs() + 0.1, drawn(3, 5, 64, dtype=BF16)
    row = torch.cat([codes, scale.view(torch.uint8), rope.view(torch.uint8)], dim=-1)
    assert row.shape[-1] == 656
    expected = torch.cat([codes.view(FP8).double() * scale.double().repeat_interleave(128, -1), rope.double()], dim=-1)
    sizes = {"latent_rank": 512, "width": 576, "dtype": BF16}
    assert torch.equal(dequantize_kv_cache(row, **sizes, out_dtype=FP64), expected)
    assert torch.equal(dequantize_kv_cache(row.view(FP8), **sizes, out_dtype=FP64), expected)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("R", "E", "HK"), SIZES)
def test_what_quantizing_keeps(R, E, HK, dtype):
    """Latents to half a unit of their last of four digits, the rest to the bit."""
    rows = drawn(2, 7, R + E + HK) * torch.logspace(-3, 3, 7)[:, None]
    kept = rows.to(dtype)
    coded = quantize_kv_cache(rows, latent_rank=R, dtype=dtype)
    assert (coded.dtype, coded.shape) == (torch.uint8, (2, 7, fp8_row_bytes(R, E, HK)))
    back = dequantize_kv_cache(coded, latent_rank=R, width=R + E + HK, dtype=dtype, out_dtype=FP64)
    assert torch.equal(back[..., R:], kept[..., R:].double())
    _, scale, rest = fp8_row_parts(coded, latent_rank=R, dtype=dtype)
    assert torch.equal(rest[..., : E + HK], kept[..., R:])
    steps = scale.double().repeat_interleave(128, -1)[..., :R]
    latents = rows[..., :R].double()
    bound = torch.maximum(latents.abs() / 16, steps / 1024) * (1 + 1e-6)
    assert ((back[..., :R] - latents).abs() <= bound).all()
    largest = torch.stack([group.abs().amax(-1) for group in rows[..., :R].split(128, -1)], -1)
    torch.testing.assert_close(scale, largest / 448, rtol=1e-6, atol=0)


def test_groups_do_not_touch_each_other():
    """Zeros stay zeros; NaN, an infinity and what is far below fp32's least number concern their 128 latents alone."""
    rows = drawn(1, 5 * 128)
    alone = dequantize_kv_cache(
        quantize_kv_cache(rows, latent_rank=640, dtype=BF16), latent_rank=640, width=640, dtype=BF16
    )
    rows[0, :128], rows[0, 130], rows[0, 260], rows[0, 384:512] = 0, torch.nan, -torch.inf, 1e-42
    back = dequantize_kv_cache(
        quantize_kv_cache(rows, latent_rank=640, dtype=BF16), latent_rank=640, width=640, dtype=BF16
    )
    zeros, nans, infinities, tiny, plain = back[0].split(128)
    assert not zeros.any()
    assert nans.isnan().all()
    assert infinities.isnan().all()
    assert (tiny.abs() <= 1e-41).all()
    assert torch.equal(plain, alone[0, 512:])


def test_strided_rows_of_any_shape():
    rows = drawn(3, 4, 2, 300)
    view = rows[::2, :, 1, 5:205]
    expected = quantize_kv_cache(view.contiguous(), latent_rank=130, dtype=FP16)
    assert torch.equal(quantize_kv_cache(view, latent_rank=130, dtype=FP16), expected)
    assert torch.equal(quantize_kv_cache(view[0, 0], latent_rank=130, dtype=FP16), expected[0, 0])
    assert quantize_kv_cache(rows[:0], latent_rank=300, dtype=FP16).shape == (0, 4, 2, fp8_row_bytes(300, 0))


def test_the_dtype_of_rope_is_that_of_the_rows():
    rows = drawn(2, 40, dtype=FP16)
    assert torch.equal(quantize_kv_cache(rows, latent_rank=32), quantize_kv_cache(rows, latent_rank=32, dtype=FP16))


def test_parts_are_views():
    cache = torch.zeros(4, 16, fp8_row_bytes(160, 32, 4), dtype=torch.uint8)
    rows = drawn(3, 196, dtype=BF16)
    pages = torch.tensor([3, 0, 3])
    cache[pages, torch.tensor([0, 5, 15])] = quantize_kv_cache(rows, latent_rank=160)
    latent, scale, rest = fp8_row_parts(cache, latent_rank=160, dtype=BF16)
    assert (latent.shape, scale.shape, rest.shape) == ((4, 16, 160), (4, 16, 2), (4, 16, 40))
    assert torch.equal(rest[0, 5, :36], rows[1, 160:])
    rest[0, 5, 32:36] = 7
    scale[0, 5] = 0
    back = dequantize_kv_cache(cache[0, 5], latent_rank=160, width=196, dtype=BF16, out_dtype=BF16)
    assert not back[:160].any()
    assert (back[192:] == 7).all()


def test_rows_between_others():
    """In a pool with a row to spare a page, as FlashMLA's own tests have it, and with bytes behind them."""
    rows = quantize_kv_cache(drawn(3, 8, 160), latent_rank=128, dtype=BF16)
    pool = torch.full((3, 9, 256), 255, dtype=torch.uint8)
    view = pool[:, :8]
    view[..., :208] = rows
    sizes = {"latent_rank": 128, "width": 160, "dtype": BF16}
    assert torch.equal(dequantize_kv_cache(view, **sizes), dequantize_kv_cache(rows, **sizes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fp8_row_bytes(0, 64), "latent_rank must be positive, .* got 0, 64 and 0"),
        (lambda: fp8_row_bytes(512, -1), "not negative, got 512, -1 and 0"),
        (lambda: quantize_kv_cache(drawn(2, 40), latent_rank=32), r"dtype must be one of .*, got torch.float32"),
        (lambda: quantize_kv_cache(drawn(2, 40), latent_rank=41, dtype=BF16), r"1 to the width of rows \(40\), got 41"),
        (lambda: quantize_kv_cache(torch.zeros(2, 40, dtype=torch.uint8), latent_rank=32), "rows must be .* got uint8"),
        (lambda: parts(torch.zeros(2, 208)), "kv_cache must be uint8 or float8_e4m3fn, got float32"),
        (
            lambda: parts(torch.zeros(2, 143, dtype=torch.uint8)),
            "with 128 latents must have at least 144 bytes, got 143",
        ),
        (lambda: parts(torch.zeros(2, 210, dtype=torch.uint8)), r"multiples of 16 bytes, got strides \[210, 1\]"),
        (lambda: parts(torch.zeros(2, 224, dtype=torch.uint8)[:, 8:]), r"got strides \[224, 1\] behind 8 bytes"),
        (lambda: parts(torch.zeros(208, 16, dtype=torch.uint8).mT), r"contiguous .* got strides \[1, 16\]"),
        (lambda: rows_of(torch.zeros(2, 192, dtype=torch.uint8)), "rows of 160 numbers .* 208 bytes, got 192"),
    ],
)
def test_rows_that_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def parts(cache):
    return fp8_row_parts(cache, latent_rank=128, dtype=BF16)


def rows_of(cache):
    return dequantize_kv_cache(cache, latent_rank=128, width=160, dtype=BF16)


# The op


@pytest.mark.parametrize("case", SMALL_FP8, ids=str)
def test_the_reference_is_that_over_dequantized_rows(case):
    """To the bit, since it computes in fp32, as they are; NaN wherever nothing may look."""
    inputs = make(case)
    queries = {name: inputs[name] for name in ("q_nope", "q_rope")}
    expected = run(dequantized(inputs, case, FP32) | queries, case)
    o, lse = run(inputs, case)
    assert o.dtype == case.dtype
    assert torch.isfinite(o).all()
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("dims", "of_o", "of_lse"),
    [((32, 128, 32, 32), 2.2e-2, 9e-3), ((16, 256, 64, 64), 2.3e-2, 5e-3), ((16, 512, 64, 128), 3.5e-2, 5e-3)],
    ids=["128+32", "256+64", "512+64"],
)
def test_what_it_costs(dims, of_o, of_lse):
    """One token over 4096 of normal numbers, against float64 over those: the numbers of docs/mla_absorb.md."""
    H, R, E, nope = dims
    g = torch.Generator().manual_seed(0)
    rows, q = (torch.randn(1, n, R + E, generator=g).bfloat16() for n in (4096, H))
    queries = q[:, None, :, :R], q[:, None, :, R:]
    options = {"cache_seqlens": torch.tensor([4096]), "scale": (nope + E) ** -0.5, "return_lse": True}
    o, lse = mla_absorb(*queries, quantize_kv_cache(rows, latent_rank=R), **options)
    exact_o, exact_lse = mla_absorb(*(half.double() for half in queries), rows.double(), **options)
    assert relative_error(o, exact_o) == pytest.approx(of_o, rel=0.05)
    assert float((lse - exact_lse).abs().max()) == pytest.approx(of_lse, rel=0.1)


def test_bytes_and_e4m3_are_the_same_cache():
    case = SMALL_FP8[1]
    inputs = make(case)
    expected = run(inputs, case)
    assert all(map(torch.equal, expected, run(inputs | {"kv_cache": inputs["kv_cache"].view(FP8)}, case)))


@pytest.mark.parametrize("page", [None, 16])
def test_gradients_of_all_but_the_cache(page):
    case = Case((40, 33), T=2, R=160, HK=2, page=page, fp8=True)
    inputs = make(case)
    inputs["key_scale"] = inputs["key_scale"].nan_to_num().clone()
    leaves = ("q_nope", "q_rope", "key_scale")
    found = gradients(lambda **kw: run(kw, case), inputs, leaves)
    rows = dequantized(inputs, case, FP32)["kv_cache"].nan_to_num()
    expected = gradients(lambda **kw: run(kw, case), inputs | {"kv_cache": rows}, leaves)
    assert found.keys() == set(leaves)
    for name in leaves:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("page", [None, 16])
def test_registration(page):
    case = Case((33, 0), page=page, HK=2, fp8=True)
    inputs = make(case)
    names = ("q_nope", "q_rope", "kv_cache", "cache_seqlens", "cache_starts", "block_table", "key_scale", "scale")
    inputs["key_scale"] = inputs["key_scale"].nan_to_num().clone()
    values = [inputs[name] for name in names]
    values = [v.requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]
    torch.library.opcheck(torch.ops.hylo_ops.mla_absorb, (*values, True, False, None))


def test_compiles_without_a_graph_break():
    """A decode step that quantizes its new row and writes it."""
    case = Case((33, 20), R=160, E=32, HK=2, page=16, fp8=True)
    inputs, rows = make(case), drawn(2, 194, dtype=BF16)
    inputs.pop("key_scale")
    pages = inputs["block_table"][torch.arange(2), (inputs["cache_seqlens"] - 1) // 16].long()
    slots = (inputs["cache_seqlens"].long() - 1) % 16

    def step(rows, cache):
        cache[pages, slots] = quantize_kv_cache(rows, latent_rank=160)
        return run(inputs | {"kv_cache": cache, "key_scale": key_scales(cache, case)}, case)

    ours, theirs = inputs["kv_cache"].clone(), inputs["kv_cache"].clone()
    expected = step(rows, theirs)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(rows, ours)
    assert torch.equal(ours, theirs)
    assert all(map(torch.equal, found, expected))


CASE = Case((33, 20), HK=2, fp8=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {"q_nope": x["q_nope"].float(), "q_rope": x["q_rope"].float()},
            "fp8 kv_cache must be bfloat16 or float16, got float32",
        ),
        (lambda x: {"kv_cache": x["kv_cache"][..., :64]}, "rows of kv_cache must hold at least 80 bytes, got 64"),
        (
            lambda x: {"kv_cache": padded(x["kv_cache"], 8)},
            r"multiples of 16 bytes, got strides \[3432, 104, 1\] behind 0",
        ),
        (lambda x: {"kv_cache": padded(x["kv_cache"], 16)[..., 8:]}, "behind 8 bytes"),
        (lambda x: {"kv_cache": x["kv_cache"].view(torch.int8)}, "kv_cache must be bfloat16 .* or uint8, got int8"),
        (lambda x: {"kv_cache": x["kv_cache"].view(torch.float8_e5m2)}, "kv_cache must be .*, got float8_e5m2"),
        (
            lambda x: {"kv_cache": x["kv_cache"].view(FP8).requires_grad_()},
            "kv_cache must not require a gradient in fp8",
        ),
        (lambda x: {"key_scale": x["kv_cache"][..., -4:-2]}, "key_scale must be .*, got uint8"),
        (lambda x: {"cache_seqlens": torch.tensor([34, 1])}, "cache_seqlens must be at most 33, .*, got 34"),
    ],
)
def test_rejected_inputs(change, message):
    inputs = make(CASE)
    with pytest.raises(ValueError, match=message):
        run(inputs | change(inputs), CASE)


def padded(cache, size):
    return torch.nn.functional.pad(cache, (0, size))
