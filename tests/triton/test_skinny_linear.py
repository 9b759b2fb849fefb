"""The Triton kernel of skinny_linear in the interpreter, against float64."""

import pytest
import torch

from hylo_ops import skinny_linear, skinny_linear_add_
from hylo_ops.skinny_linear import triton_fwd
from hylo_ops.skinny_linear.triton_fwd import Config, config_for
from tests.ops.test_skinny_linear import KINDS, check_within_budget, make, ours

BF16, FP16 = torch.bfloat16, torch.float16


def check(kind, x):
    return check_within_budget(kind, x, backend="triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "N", "K"),
    [((1,), 24, 48), ((3,), 65, 2048), ((2, 8), 1, 16), ((17,), 130, 528), ((5, 1, 7), 64, 1040), ((64,), 200, 1536)],
)
def test_agrees_with_float64(rows, N, K, kind):
    y = check(kind, make(*rows, N=N, K=K, kind=kind, dtype=FP16))
    assert y.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16(kind):
    check(kind, make(5, N=80, K=1024, kind=kind, dtype=BF16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 5, 8])
def test_parts_of_k_are_added_up(monkeypatch, parts, kind):
    """Also more of them than steps, so that some have none; and tickets are 0 for the next launch."""
    counters = torch.zeros(8, dtype=torch.int32)
    monkeypatch.setattr(triton_fwd, "tickets", lambda count, device: counters)
    monkeypatch.setattr(triton_fwd, "config_for", lambda *_: Config(32, 16, 64, parts, 4, 2))
    triton_fwd._plan.cache_clear()
    x = make(5, N=40, K=400, kind=kind, dtype=FP16)
    first = check(kind, x)
    assert not counters.any()
    assert torch.equal(ours(kind, **x, backend="triton"), first)
    triton_fwd._plan.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows(kind):
    """x in any way, weights and residual by rows; beside them NaN."""
    x = make(6, N=40, K=96, kind=kind, dtype=FP16)
    expected = ours(kind, **x, backend="triton")
    views = {}
    for name, tensor in x.items():
        wide = torch.full((len(tensor), 2 * tensor.shape[1]), torch.nan, dtype=FP16)
        views[name] = wide[:, 7 : 7 + tensor.shape[1]].copy_(tensor)
    y = skinny_linear_add_(**views, backend="triton") if kind == "add" else ours(kind, **views, backend="triton")
    assert torch.equal(y, expected)
    if kind == "add":
        assert y is views["residual"]
        assert y._base[:, :7].isnan().all()
        assert y._base[:, 47:].isnan().all()
    for odd in (x["x"].T.contiguous().T, x["x"].view(2, 3, -1).transpose(0, 1)):
        if kind != "add":
            again = ours(kind, odd, x["weight"], backend="triton")
            assert torch.equal(again, ours(kind, odd.contiguous(), x["weight"], backend="triton"))


@pytest.mark.parametrize("gate", [-6e4, -100.0, 0.0, 6e4])
def test_hostile_gates_stay_finite(gate):
    x = make(3, K=16, kind="swiglu", dtype=FP16)
    x["x"][:, 0], x["weight"][:24], x["weight"][24:] = 1, 0, 0.1
    x["weight"][:24, 0] = gate
    x["x"][:, 1:] *= 0.1
    assert check("swiglu", x).isfinite().all()


def test_infinities_and_nan_stay_in_their_rows_and_columns():
    x = make(5, N=70, K=512, dtype=FP16)
    x["x"][1], x["weight"][3] = torch.nan, torch.inf
    y = skinny_linear(**x, backend="triton")
    assert y[1].isnan().all()
    assert not y[:, 3].isfinite().any()
    kept = [0, 2, 3, 4]
    assert y[kept][:, [n for n in range(70) if n != 3]].isfinite().all()


def test_nothing_is_nothing():
    assert skinny_linear(torch.zeros(2, 16).half(), torch.zeros(0, 16).half(), backend="triton").shape == (2, 0)


@pytest.mark.parametrize("shared", [64, 99, 163, 227])
@pytest.mark.parametrize("multiprocessors", [20, 108, 132])
def test_tiles_fit_and_parts_fill_a_gpu(multiprocessors, shared):
    for B in (1, 16, 17, 32, 33, 64):
        for rows, K in ((2048, 2048), (9232, 2048), (16384, 3072), (3072, 8192), (128256, 2048), (1, 16), (64, 528)):
            c = config_for(B, rows, K, multiprocessors, shared << 10)
            assert c.BB >= B
            assert 2 * c.stages * c.BK * (c.BN + c.BB) <= shared << 10
            assert 1 <= c.parts <= max(K // 256, 1)
            assert c.parts <= 8
            if K >= 2048 and -(-rows // c.BN) <= multiprocessors // 2:
                assert c.parts > 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(4, 24).half(), "weight": torch.zeros(8, 24).half()}, "K is 24, not a multiple of 16"),
        ({"x": torch.zeros(4, 0).half(), "weight": torch.zeros(8, 0).half()}, "K is 0, not a multiple of 16"),
        ({"weight": torch.zeros(16, 8).half().T}, "the last dim of weight is not contiguous"),
        ({"residual": torch.zeros(8, 4).half().T}, "the rows of residual are not contiguous"),
        (
            {"x": torch.zeros(2, 2, 16).half(), "residual": torch.zeros(2, 3, 8).half()[:, :2]},
            "the rows of residual are not contiguous or not evenly apart: its strides are",
        ),
        (
            {name: torch.zeros(shape) for name, shape in (("x", (4, 16)), ("weight", (8, 16)), ("residual", (4, 8)))},
            "x is torch.float32, not bfloat16 or float16",
        ),
    ],
)
def test_what_it_cannot_run(change, reason):
    x = {"x": torch.zeros(4, 16).half(), "weight": torch.zeros(8, 16).half(), "residual": torch.zeros(4, 8).half()}
    with pytest.raises(NotImplementedError, match=reason):
        skinny_linear_add_(**(x | change), backend="triton")


def test_registration():
    """In the interpreter backend=None takes Triton."""
    x = make(2, 3, kind="add", dtype=FP16, N=24)
    torch.library.opcheck(torch.ops.hylo_ops.skinny_linear, (x["x"], x["weight"], True, True, None))
    torch.library.opcheck(torch.ops.hylo_ops.skinny_linear_add_, (x["x"], x["weight"], x["residual"], True, None))
