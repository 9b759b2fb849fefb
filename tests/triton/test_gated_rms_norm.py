"""The Triton kernels of gated_rms_norm in the interpreter, against float64: the cases of the CUDA kernels and more."""

import pytest
import torch

from hylo_ops import gated_rms_norm
from hylo_ops.gated_rms_norm import triton, triton_bwd
from hylo_ops.testing import cast, gradients, within_budget
from tests.csrc.gated_rms_norm_cases import BACKWARD_CASES, CASES, run_and_check, run_and_check_backward

EPS = 1e-5


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Each walks over several tiles."""
    monkeypatch.setattr(triton_bwd, "_WARPS", 8)


def run(x, order, backend="triton", eps=EPS):
    return gated_rms_norm(**x, eps=eps, norm_before_gate=order, backend=backend)


def make(B=2, T=7, H=3, V=8, per_head=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(B, T, H, V, generator=g).to(dtype),
        "gate": torch.randn(B, T, H, V, generator=g).to(dtype),
        "weight": torch.randn(*([H, V] if per_head else [V]), generator=g).to(dtype),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case):
    run_and_check(case, "cpu", triton.forward)


@pytest.mark.parametrize("case", [*CASES, *BACKWARD_CASES], ids=lambda case: case.name)
def test_the_gradients_agree_with_float64(case):
    run_and_check_backward(case, "cpu", triton.backward)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_through_autograd(order, per_head):
    x = make(per_head=per_head)
    ours = gradients(lambda **kw: run(kw, order), x, list(x), torch.bfloat16)
    eager = gradients(lambda **kw: run(kw, order, "reference"), x, list(x), torch.bfloat16)
    exact = gradients(lambda **kw: run(kw, order, "reference"), cast(x, torch.float64), list(x), torch.bfloat16)
    for name in x:
        within_budget(ours[name], eager[name], exact[name], name)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
@pytest.mark.parametrize("gate", [-1e4, 0.0, 1e4])
def test_hostile_sizes_stay_finite(order, dtype, size, gate):
    x = make(dtype=dtype)
    x["x"] = x["x"].sign() * size
    x["gate"] = torch.full_like(x["gate"], gate)
    x["weight"] = torch.full_like(x["weight"], 1e-2)
    exact = run(cast(x, torch.float64), order, "reference")
    within_budget(run(x, order), run(x, order, "reference"), exact)
    dy = torch.ones_like(x["x"]) / 1024
    assert all(g.isfinite().all() for g in triton.backward([dy], *x.values(), EPS, order))


def test_without_eps_a_row_that_is_not_there_harms_no_other():
    x = make(B=1, T=5, H=1)
    dx, dgate, dweight = triton.backward([torch.ones_like(x["x"])], *x.values(), 0.0, True)
    assert all(g.isfinite().all() for g in (dx, dgate, dweight))


def test_a_gradient_that_is_one_number_repeated():
    x = make()
    repeated = triton.backward([torch.ones(()).expand(x["x"].shape)], *x.values(), EPS, False)
    for a, b in zip(repeated, triton.backward([torch.ones_like(x["x"])], *x.values(), EPS, False), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 2, 3, 8).double(), "gate": torch.zeros(1, 2, 3, 8).double()}, "x is torch.float64"),
        ({"weight": torch.zeros(8).double()}, "weight is torch.float64"),
        ({"gate": torch.zeros(1, 2, 3, 16)[..., ::2]}, "the last dim of gate is not contiguous"),
        ({name: torch.zeros(1, 1, 1, 16392) for name in ("x", "gate")} | {"weight": torch.zeros(16392)}, "V is 16392"),
    ],
)
def test_what_it_cannot_run(change, reason):
    with pytest.raises(NotImplementedError, match=reason):
        run(make(B=1, T=2, per_head=False) | change, True)


def test_registration():
    """In the interpreter backend=None takes Triton."""
    leaves = [value.requires_grad_() for value in make(1, 3, 2, 4).values()]
    torch.library.opcheck(torch.ops.hylo_ops.gated_rms_norm, (*leaves, EPS, True, None))
