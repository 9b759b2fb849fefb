"""l2_norm: definition, gradients, hostile inputs, error budget, registration, rejected inputs."""

import pytest
import torch

from hylo_ops import l2_norm
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.budgets import check_within_budget

DTYPE = torch.float64


def make(*dims, dtype=DTYPE):
    return {"x": torch.randn(dims or (2, 7, 3, 24), generator=torch.Generator().manual_seed(0)).to(dtype)}


def plain(x, eps=1e-6):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def heads(dtype=DTYPE):
    """Keys of all heads as a convolution over queries, keys and values leaves them."""
    return (
        torch.randn(2, 7, 100, generator=torch.Generator().manual_seed(0)).to(dtype)[..., 24:72].unflatten(-1, (3, 16))
    )


@pytest.mark.parametrize("dims", [(2, 7, 3, 24), (1,), (5,), (3, 1), (2, 0, 8)])
def test_equals_the_definition(dims):
    x = make(*dims)
    torch.testing.assert_close(l2_norm(**x), plain(**x), rtol=0, atol=1e-12)
    torch.testing.assert_close(l2_norm(**x, eps=0.5), plain(**x, eps=0.5), rtol=0, atol=1e-12)


def test_gradients():
    assert torch.autograd.gradcheck(l2_norm, (make(2, 3, 5)["x"].requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype):
    check_within_budget(l2_norm, plain, make(2, 37, 128, dtype=dtype))


@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(size):
    x = make(dtype=torch.float16)
    x["x"] = x["x"].sign() * size
    exact = plain(**cast(x, DTYPE))
    within_budget(l2_norm(**x), exact.half(), exact)
    assert torch.isfinite(gradients(l2_norm, cast(x, torch.float32), list(x))["x"]).all()


def test_strided_views():
    view = heads()
    torch.testing.assert_close(l2_norm(view), plain(view), rtol=0, atol=1e-12)
    assert l2_norm(view).is_contiguous()
    transposed = view.permute(3, 1, 0, 2)
    torch.testing.assert_close(l2_norm(transposed), plain(transposed), rtol=0, atol=1e-12)
    assert l2_norm(transposed).is_contiguous()


def test_the_view_itself_and_one_number_a_row_are_kept():
    x = heads().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        l2_norm(x)
    assert sorted((t.ndim, t.data_ptr() == x.data_ptr()) for t in kept) == [(3, False), (4, True)]


def test_registration():
    torch.library.opcheck(torch.ops.hylo_ops.l2_norm, (heads(torch.float32).requires_grad_(), 1e-6, None))


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)["x"].requires_grad_()

    def step(x):
        return l2_norm(x * 2).sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(()), r"x must have shape \[..., K\], got \[\]"),
        (torch.zeros(2, 8, dtype=torch.int32), "x must be bfloat16 or .*, got int32"),
    ],
)
def test_rejected_inputs(x, message):
    with pytest.raises(ValueError, match=message):
        l2_norm(x)


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        l2_norm(**make(), backend="tpu")
