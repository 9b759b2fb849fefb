"""The Triton kernels of swiglu in the interpreter, against float64."""

from functools import partial

import pytest
import torch

from hylo_ops import swiglu
from hylo_ops.swiglu import triton, triton_fwd
from hylo_ops.testing import gradients
from tests.ops.budgets import check_within_budget
from tests.ops.layouts import shifted, strided
from tests.ops.test_swiglu import make

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(x):
    y = check_within_budget(partial(swiglu, backend="triton"), partial(swiglu, backend="reference"), x)
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dims", [(2, 7, 48), (2,), (66,), (1, 2), (37, 64), (2, 3, 2 * 333), (3, 2 * 5120)])
def test_agrees_with_float64(dtype, dims):
    check(make(*dims, dtype=dtype))


@pytest.mark.parametrize("dims", [(2, 0, 8), (2, 3, 0)])
def test_nothing(dims):
    x = make(*dims, dtype=FP32)
    assert swiglu(**x, backend="triton").shape == (*dims[:-1], dims[-1] // 2)
    assert gradients(partial(swiglu, backend="triton"), x, ["gate_up"])["gate_up"].shape == dims


def test_strided_rows_and_odd_addresses():
    wide = torch.randn(3, 8, 200, generator=torch.Generator().manual_seed(0))
    for view in (wide[..., 8:104], wide[:, ::2, 3:51], wide[..., :64].transpose(0, 1)):
        check({"gate_up": view})
        check({"gate_up": view.to(BF16)})
        y = triton.forward(view)
        assert torch.equal(triton.backward([y], view)[0], triton.backward([y], view.contiguous())[0])
    check({"gate_up": shifted(wide).copy_(wide)})


def test_a_gradient_in_any_layout():
    x = make(5, 48, dtype=FP32)["gate_up"]
    dy = make(5, 24, dtype=FP32)["gate_up"]
    (expected,) = triton.backward([dy], x)
    assert torch.equal(triton.backward([strided(dy)], x)[0], expected)
    one = torch.ones(())
    assert torch.equal(triton.backward([one.expand(5, 24)], x)[0], triton.backward([torch.ones(5, 24)], x)[0])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("gate", [-1e4, -100.0, -87.5, 0.0, 1e4])
def test_hostile_gates_stay_finite(dtype, gate):
    x = make(dtype=dtype)
    x["gate_up"][..., :24] = gate
    check(x)


def test_tiles_cover_everything():
    for rows, N in ((1, 1), (7, 24), (32768, 8192), (65536, 14336), (5, 9728)):
        tile, beside, tiles = triton_fwd.tiles_of(rows, N)
        assert beside * tile.BV >= N
        assert tiles // beside * tile.BR >= rows
        assert tile.BR * tile.BV == 2048 or N == 1


@pytest.mark.parametrize(
    ("gate_up", "reason"),
    [
        (torch.zeros(2, 24).double(), "gate_up is torch.float64"),
        (torch.zeros(2, 48)[..., ::2], "the last dim of gate_up is not contiguous"),
    ],
)
def test_what_it_cannot_run(gate_up, reason):
    with pytest.raises(NotImplementedError, match=reason):
        swiglu(gate_up, backend="triton")


def test_registration():
    """In the interpreter backend=None takes Triton."""
    torch.library.opcheck(torch.ops.hylo_ops.swiglu, (make(dtype=FP32)["gate_up"].requires_grad_(), None))
