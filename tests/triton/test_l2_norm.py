"""The Triton kernels of l2_norm in the interpreter, against float64."""

from functools import partial

import pytest
import torch

from hylo_ops import l2_norm
from hylo_ops.common.triton_rows import as_rows
from hylo_ops.l2_norm import triton
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.budgets import check_within_budget
from tests.ops.layouts import shifted, strided
from tests.ops.test_l2_norm import heads, make

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(x):
    y = check_within_budget(partial(l2_norm, backend="triton"), partial(l2_norm, backend="reference"), x)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dims", [(2, 7, 3, 16), (3,), (1, 1), (37, 64), (33, 100), (19, 6, 256), (5, 512), (2, 8192)])
def test_agrees_with_float64(dtype, dims):
    check(make(*dims, dtype=dtype))


def test_no_rows():
    x = make(2, 0, 8, dtype=FP32)
    assert gradients(partial(l2_norm, backend="triton"), x, ["x"])["x"].shape == (2, 0, 8)


def test_strided_views():
    for view in (heads(BF16), heads(FP32)[:, ::2], heads(FP32).transpose(0, 2), heads(FP32)[:, :, None, ::2]):
        check({"x": view})
        y, scale = triton.forward(view, 1e-6)
        given = [y + 1], [scale]
        assert torch.equal(triton.backward(*given, view, 1e-6)[0], triton.backward(*given, view.contiguous(), 1e-6)[0])
    check({"x": make(2, 3, 4, 5, 6, 8, dtype=FP32)["x"][:, ::2, ::2, ::2, ::2]})
    x = make(5, 24, dtype=BF16)["x"]
    check({"x": shifted(x).copy_(x)})


def test_heads_within_a_projection_are_read_where_they_are():
    """In one pass over rows, whose places take two strides."""
    view = heads(FP32)
    rows, sizes, strides = as_rows(view)
    assert rows is view
    assert (sizes, strides) == ((1, 14, 3), (0, 100, 16))
    assert as_rows(view.contiguous())[1:] == ((1, 42, 1), (0, 16, 0))
    many = make(2, 3, 4, 5, 6, 8, dtype=FP32)["x"][:, ::2, ::2, ::2, ::2]
    assert as_rows(many)[0].is_contiguous()


def test_a_gradient_in_any_layout():
    x = heads(FP32)
    _, scale = triton.forward(x, 1e-6)
    dy = make(*x.shape, dtype=FP32)["x"]
    assert torch.equal(triton.backward([strided(dy)], [scale], x, 1e-6)[0], triton.backward([dy], [scale], x, 1e-6)[0])


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(dtype, size):
    x = make(dtype=dtype)
    x["x"] = x["x"].sign() * size
    exact = l2_norm(**cast(x, torch.float64), backend="reference")
    within_budget(l2_norm(**x, backend="triton"), exact.to(dtype), exact)
    assert gradients(partial(l2_norm, backend="triton"), x, ["x"])["x"].isfinite().all()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(2, 24).double(), "x is torch.float64"),
        (torch.zeros(2, 48)[..., ::2], "the last dim of x is not contiguous"),
        (torch.zeros(1, 8200), "K is 8200"),
    ],
)
def test_what_it_cannot_run(x, reason):
    with pytest.raises(NotImplementedError, match=reason):
        l2_norm(x, backend="triton")


def test_registration():
    """In the interpreter backend=None takes Triton."""
    torch.library.opcheck(torch.ops.hylo_ops.l2_norm, (heads(FP32).requires_grad_(), 1e-6, None))
