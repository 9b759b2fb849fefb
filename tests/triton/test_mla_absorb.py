"""Absorbed attention in Triton against the definition in float64."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from hylo_ops import fp8_row_bytes, mla_absorb
from hylo_ops.mla_absorb import reference, triton_decode
from hylo_ops.mla_absorb import triton as backend
from hylo_ops.mla_absorb.triton_decode import Config
from hylo_ops.mla_absorb.triton_rows import from_e4m3
from hylo_ops.testing import gradients, within_budget
from tests.triton.mla_absorb_cases import BF16, FP16, FP32, SMALL, SMALL_FP8, Case, dequantized, make

NAMES = ("q_nope", "q_rope", "kv_cache", "cache_seqlens", "cache_starts", "block_table", "key_scale")
CUT = Config(16, 32, 4, 1, 1, 2, least=32, group=4)  # small shares, merged four by four


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    monkeypatch.setattr(triton_decode, "config_for", lambda *_: CUT)
    triton_decode._plan.cache_clear()
    yield
    triton_decode._plan.cache_clear()


def run(inputs, case, name="triton"):
    options = {"causal": case.causal, "fixed_split": case.fixed_split, "return_lse": True, "backend": name}
    return mla_absorb(**inputs, **options)


def exact(inputs, case):
    """The definition in float64, on the inputs as they are rounded; it reads entries of the table that nobody needs."""
    table = inputs["block_table"]
    clean = {"block_table": None if table is None else table.clamp(0, len(inputs["kv_cache"]) - 1)}
    wide = dequantized(inputs | clean, case, torch.float64)
    return reference.step_by_step(*(wide[name] for name in NAMES), scale=inputs["scale"], causal=case.causal)


def check(inputs, case):
    o, lse = run(inputs, case)
    expected, eager = exact(inputs, case), run(inputs, case, "reference")
    assert o.dtype == case.dtype
    assert lse.dtype == FP32
    seen = expected[1] > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert not o[~seen].any()
    within_budget(o[seen], eager[0][seen], expected[0][seen], "o")
    torch.testing.assert_close(lse[seen], expected[1][seen].float(), rtol=2e-6, atol=2e-5)
    return o, lse


@pytest.mark.parametrize("case", [*SMALL, *SMALL_FP8], ids=str)
def test_equals_the_definition(case):
    check(make(case), case)


@pytest.mark.parametrize("has_e4m3", [False, True])
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_every_byte_of_e4m3(has_e4m3, dtype):
    """With and without a GPU's own conversion; a NaN is left to the scale without it."""
    bits = torch.arange(256, dtype=torch.uint8)
    found, expected = torch.empty(256, dtype=dtype), bits.view(torch.float8_e4m3fn).to(dtype)
    converted[(1,)](bits, found, has_e4m3, {FP16: tl.float16, FP32: tl.float32}[dtype])
    number = ~expected.isnan()
    assert int(number.sum()) == 254
    assert torch.equal(found[number], expected[number])


@triton.jit
def converted(p_bits, p_out, HAS_E4M3: tl.constexpr, DOT: tl.constexpr):
    o_i = tl.arange(0, 256)
    tl.store(p_out + o_i, from_e4m3(tl.load(p_bits + o_i), DOT, HAS_E4M3))


@pytest.mark.parametrize(("group", "lengths", "H"), [(4, (1056, 320), 4), (16, (250, 90), 19)])
def test_merging_in_rounds(group, lengths, H, monkeypatch):
    """17 pieces, four by four: the fifth group of the first round has one, and so has the second of the second."""
    monkeypatch.setattr(triton_decode, "config_for", lambda *_: dataclasses.replace(CUT, group=group, programs=3))
    case = Case(lengths, H=H, dtype=FP32)
    check(make(case), case)


def test_the_same_bits_whichever_piece_comes_last(monkeypatch):
    monkeypatch.setattr(triton_decode, "config_for", lambda *_: dataclasses.replace(CUT, programs=3))
    case = Case((250, 400), dtype=FP32)
    forwards = run(make(case), case)
    builder, done = interpreter.interpreter_builder, []
    place = builder.set_grid_idx

    def backwards(x, y, z):
        done.append(x)
        place(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert all(map(torch.equal, forwards, run(make(case), case)))
    assert len(done) > 8


def test_tickets_are_left_at_zero(monkeypatch):
    """So that the next launch, or the next replay of this one, starts as this one did."""
    taken, shared = [], torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(triton_decode, "tickets", lambda count, device: taken.append(count) or shared)
    case = Case((250, 90, 0))
    first = run(make(case), case)
    other = run(make(case, seed=1), case)
    again = run(make(case), case)
    assert max(taken) <= len(shared)
    assert not shared.any()
    assert not torch.equal(first[0], other[0])
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("page", [None, 16])
def test_fixed_split_bits_alone_and_in_a_batch(page):
    """Neither neighbours nor room left in cache or table may change a sequence's sums."""
    case = Case((1100, 130, 600), T=2, page=page, fixed_split=True, spare=50, dtype=FP32)
    inputs = make(case)
    o, lse = run(inputs, case)
    for n, length in enumerate(case.lengths):
        alone = inputs | {name: inputs[name][n : n + 1] for name in ("q_nope", "q_rope", "cache_seqlens")}
        if page is None:
            alone["kv_cache"] = inputs["kv_cache"][n : n + 1, :length]
        else:
            alone["block_table"] = inputs["block_table"][n : n + 1, : -(-length // page)]
        o_n, lse_n = run(alone, case)
        assert torch.equal(o[n], o_n[0])
        assert torch.equal(lse[n], lse_n[0])


@pytest.mark.parametrize("fixed_split", [False, True])
def test_many_sequences(fixed_split, monkeypatch):
    """More than a program looks at together."""
    monkeypatch.setattr(triton_decode, "_FEW", 2)
    monkeypatch.setattr(triton_decode, "_MANY", 2)
    case = Case((40, 0, 70, 3, 100), H=2, R=16, E=0, fixed_split=fixed_split, dtype=FP32)
    check(make(case), case)


def test_strided_views():
    """Queries side by side in one projection, every second page of a pool, scales of their own dtype and layout."""
    case = Case((60, 33), T=2, page=16, HK=2)
    inputs = make(case)
    q = torch.randn(2, 2, 4, 50).to(BF16)
    pool = torch.full((2 * len(inputs["kv_cache"]), 16, 57), torch.nan, dtype=BF16)
    pool[::2, :, :50] = inputs["kv_cache"]
    scales = inputs["key_scale"].float().transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs | {"q_nope": q[..., :32], "q_rope": q[..., 33:49], "kv_cache": pool[::2], "key_scale": scales}, case)


def test_strided_rows_in_fp8():
    """Every second page of a pool, with bytes behind the rows, and scales of their own dtype and layout."""
    case = Case((60, 33), T=2, R=160, page=16, HK=2, fp8=True)
    inputs = make(case)
    row = inputs["kv_cache"].shape[-1]
    pool = torch.full((2 * len(inputs["kv_cache"]), 16, row + 32), 255, dtype=torch.uint8)
    pool[::2, :, :row] = inputs["kv_cache"]
    scales = inputs["key_scale"].float().transpose(1, 2).contiguous().transpose(1, 2)
    check(inputs | {"kv_cache": pool[::2], "key_scale": scales}, case)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_dtypes_of_indices_and_a_narrow_cache(index):
    case = Case((60, 33), page=16, starts=(3, 30), dtype=FP32)
    inputs = make(case)
    for name in ("cache_seqlens", "cache_starts", "block_table"):
        inputs[name] = inputs[name].to(index)
    check(inputs | {"kv_cache": inputs["kv_cache"].to(BF16)}, case)


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_scores(factor):
    case = Case((130, 30), dtype=FP32)
    inputs = make(case)
    inputs["q_nope"] *= factor
    o, _ = run(inputs, case)
    expected, eager = exact(inputs, case), run(inputs, case, "reference")
    within_budget(o, eager[0], expected[0], "o")


def test_no_tokens():
    case = Case((5, 3))
    inputs = make(case)
    empty = inputs | {name: inputs[name][:, :0] for name in ("q_nope", "q_rope")}
    o, lse = run(empty, case)
    assert o.shape == (2, 0, 4, 32)
    assert lse.shape == (2, 0, 4)


def test_gradients_are_the_reference_s():
    case = Case((40, 33), dtype=FP32, HK=2)
    inputs = make(case)
    inputs["kv_cache"] = inputs["kv_cache"].nan_to_num()
    inputs["key_scale"] = inputs["key_scale"].nan_to_num().clone()
    leaves = ("q_nope", "q_rope", "kv_cache", "key_scale")
    got = gradients(lambda **kw: run(kw, case), inputs, leaves)
    expected = gradients(lambda **kw: run(kw, case, "reference"), inputs, leaves)
    for name in leaves:
        assert torch.equal(got[name], expected[name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"R": 592}, "R is 592, not a multiple of 16 up to 576"),
        ({"R": 24}, "R is 24, not a multiple of 16"),
        ({"E": 8}, "E is 8, not a multiple of 16 up to 128"),
        ({"dtype": torch.float64}, "q_nope is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_refuses(change, reason):
    case = dataclasses.replace(Case((5,), dtype=FP32), **change)
    with pytest.raises(NotImplementedError, match=f"triton: {reason}"):
        run(make(case), case)


def test_supports_the_whole_contract():
    options = {"scale": 1.0, "causal": True, "fixed_split": False}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for R in range(16, 577, 16):
            for E in (0, 16, 32, 64, 96, 128):
                q, rope = torch.empty(1, 1, 1, R, dtype=dtype), torch.empty(1, 1, 1, E, dtype=dtype)
                cache, lengths = torch.empty(1, 1, R + E, dtype=dtype), torch.zeros(1, dtype=torch.int32)
                assert backend.why_not(q, rope, cache, lengths, None, None, None, **options) is None
                if dtype != FP32:
                    rows = torch.empty(1, 1, fp8_row_bytes(R, E), dtype=torch.uint8)
                    assert backend.why_not(q, rope, rows, lengths, None, None, None, **options) is None
