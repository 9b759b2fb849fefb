"""The Triton kernels of rms_norm in the interpreter, against float64."""

import pytest
import torch

from hylo_ops import rms_norm
from hylo_ops.rms_norm import reference, triton, triton_bwd
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.layouts import shifted, strided
from tests.ops.test_rms_norm import BF16, DTYPES, EPS, FP16, FP32, check_triton, make, norm


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each walks over several tiles."""
    monkeypatch.setattr(triton_bwd, "_MULTIPROCESSORS", 1)
    monkeypatch.setattr(triton_bwd, "_WARPS", 8)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))
@pytest.mark.parametrize("dims", [(3, 37, 64), (2, 5, 333)])
def test_agrees_with_float64(dtypes, dims):
    of_x, of_residual, of_weight, of_y = dtypes
    options = {"dtype": of_x, "residual_dtype": of_residual, "weight_dtype": of_weight}
    check_triton(make(*dims, with_residual=of_residual is not None, **options), of_y)


@pytest.mark.parametrize(
    "dims", [(1,), (24,), (1, 1), (67, 128), (11, 3, 2, 16), (9, 2048), (3, 3072), (2, 5000), (3, 8192)]
)
def test_widths(dims):
    check_triton(make(*dims, dtype=FP32))
    check_triton(make(*dims, with_residual=False, dtype=BF16, weight_dtype=FP32))


@pytest.mark.parametrize("with_residual", [True, False])
def test_no_rows(with_residual):
    x = make(2, 0, 8, with_residual=with_residual, dtype=FP32)
    found = gradients(norm("triton"), x, list(x))
    assert {name: g.shape for name, g in found.items()} == {name: t.shape for name, t in x.items()}
    assert (found["weight"] == 0).all()


def drawn(*dims):
    return torch.randn(dims, generator=torch.Generator().manual_seed(0))


def heads(dtype):
    """Queries of all heads within one projection: nothing may copy them."""
    return drawn(2, 7, 320).to(dtype)[..., 64:256].unflatten(-1, (3, 64))


@pytest.mark.parametrize("change", [heads(BF16), heads(FP32)[:, ::2], heads(FP32).transpose(1, 2)], ids=[0, 1, 2])
def test_strided_views(change):
    x = {"x": change, "weight": drawn(64, 3)[:, 1]}
    check_triton(x)
    y, _, rstd = triton.forward(*x.values(), None, EPS, None)
    results = [triton.backward(y, None, t, x["weight"], rstd, t.dtype) for t in (change, change.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    check_triton({**x, "residual": drawn(64, *change.shape[:-1]).permute(1, 2, 3, 0)})


def test_odd_addresses():
    x = {name: shifted(t).copy_(t) for name, t in make(3, 24, dtype=BF16).items()}
    check_triton(x)


def test_gradients_in_any_layout():
    x = make(5, 48, dtype=FP32)
    _, total, rstd = triton.forward(x["x"], x["weight"], x["residual"], EPS, BF16)
    dy, dtotal = drawn(5, 48).to(BF16), drawn(48, 5).mT
    ones = torch.ones((), dtype=BF16).expand(5, 48)
    for given in ((strided(dy), dtotal), (dy, None), (ones, dtotal)):
        others = (total, x["weight"], rstd)
        found = triton.backward(*given, *others, BF16)
        eager = reference.backward(*given, *others, BF16)
        wide = [t if t is None else t.double() for t in (*given, *others)]
        exact, _, of_weight = reference.backward(*wide, torch.float64)
        for name, *values in zip(("dtotal", "dx", "dweight"), found, eager, (exact, exact, of_weight), strict=True):
            within_budget(*values, name)


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(dtype, size):
    x = make(2, 7, 24, with_residual=False, dtype=dtype)
    x["x"] = x["x"].sign() * size
    within_budget(norm("triton")(**x), norm("reference")(**x), norm("reference")(**cast(x, torch.float64)))
    assert all(g.isfinite().all() for g in gradients(norm("triton"), x, list(x)).values())


def test_a_row_that_is_not_there_harms_no_other():
    x = make(5, 24, with_residual=False, dtype=FP32)
    y, _, rstd = triton.forward(x["x"], x["weight"], None, 0.0, None)
    found = triton.backward(torch.ones_like(y), None, x["x"], x["weight"], rstd, FP32)
    assert all(t.isfinite().all() for t in (y, rstd, *found))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(2, 24).double()}, "x is torch.float64"),
        ({"weight": torch.zeros(24).double()}, "weight is torch.float64"),
        ({"residual": torch.zeros(2, 24).double()}, "residual is torch.float64"),
        ({"dtype": torch.float64}, "y would be torch.float64"),
        ({"x": torch.zeros(2, 48)[..., ::2]}, "the last dim of x is not contiguous"),
        ({"x": torch.zeros(1, 8200), "weight": torch.zeros(8200)}, "D is 8200"),
    ],
)
def test_what_it_cannot_run(change, reason):
    with pytest.raises(NotImplementedError, match=reason):
        rms_norm(**{**make(2, 24, with_residual=False, dtype=FP32), **change}, eps=EPS, backend="triton")


@pytest.mark.parametrize("with_residual", [True, False])
def test_registration(with_residual):
    """In the interpreter backend=None takes Triton."""
    leaves = [value.requires_grad_() for value in make(3, 8, with_residual=with_residual, dtype=FP32).values()]
    arguments = (*leaves, *([] if with_residual else [None]), EPS, BF16, None)
    torch.library.opcheck(torch.ops.hylo_ops.rms_norm, arguments)
