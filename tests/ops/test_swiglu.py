"""swiglu: definition, gradients, hostile inputs, error budget, registration, rejected inputs."""

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import swiglu
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.budgets import check_within_budget

DTYPE = torch.float64


def make(*dims, dtype=DTYPE):
    return {"gate_up": torch.randn(dims or (2, 7, 48), generator=torch.Generator().manual_seed(0)).to(dtype)}


def plain(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dims", [(2, 7, 48), (2,), (1, 2), (3, 1, 2, 66), (2, 0, 8), (2, 3, 0)])
def test_equals_the_definition(dims):
    x = make(*dims)
    torch.testing.assert_close(swiglu(**x), plain(**x), rtol=0, atol=1e-12)


def test_gradients():
    assert torch.autograd.gradcheck(swiglu, (make(2, 3, 6)["gate_up"].requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype):
    check_within_budget(swiglu, plain, make(2, 37, 128, dtype=dtype))


@pytest.mark.parametrize("gate", [-1e4, -100.0, 0.0, 1e4])
def test_hostile_gates_stay_finite(gate):
    x = make(dtype=torch.float32)
    x["gate_up"][..., :24] = gate
    within_budget(swiglu(**x), *[plain(**cast(x, DTYPE))] * 2)
    assert torch.isfinite(gradients(swiglu, x, list(x))["gate_up"]).all()


def test_only_gate_up_is_kept():
    x = make()["gate_up"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_strided_views():
    view = torch.randn(48, 7, 3, dtype=DTYPE).permute(2, 1, 0)
    assert swiglu(view).is_contiguous()
    torch.testing.assert_close(swiglu(view), plain(view), rtol=0, atol=1e-12)
    torch.testing.assert_close(swiglu(view[:, ::2]), plain(view[:, ::2]), rtol=0, atol=1e-12)


def test_registration():
    torch.library.opcheck(torch.ops.hylo_ops.swiglu, (make(dtype=torch.float32)["gate_up"].requires_grad_(), None))


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)["gate_up"].requires_grad_()

    def step(gate_up):
        return swiglu(gate_up * 2).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(2, 7, 25), r"gate_up must have shape \[..., 2 N\], got \[2, 7, 25\]"),
        (torch.zeros(()), r"gate_up must have shape \[..., 2 N\], got \[\]"),
        (torch.zeros(2, 8, dtype=torch.int32), "gate_up must be bfloat16 or .*, got int32"),
    ],
)
def test_rejected_inputs(gate_up, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate_up)


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        swiglu(**make(), backend="tpu")
