"""The Triton kernels of swiglu on a GPU, through the public op and autograd, against float64."""

from functools import partial

import pytest
import torch

from hylo_ops import swiglu
from hylo_ops.swiglu import reference, triton
from hylo_ops.testing import within_budget
from tests.ops.budgets import check_within_budget
from tests.ops.test_swiglu import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIMS = [(2, 501, 2 * 8192), (1001, 2 * 6144), (3, 2 * 9728), (2, 7, 2 * 333), (1, 2), (999, 64)]


def check(x):
    check_within_budget(partial(swiglu, backend="triton"), partial(swiglu, backend="reference"), x)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_forward_and_gradients(dtype, dims):
    check({"gate_up": make(*dims, dtype=dtype)["gate_up"].cuda()})


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_strided_rows(dtype):
    wide = make(3, 500, 640, dtype=dtype)["gate_up"].cuda()
    for view in (wide[..., 64:576], wide[:, ::2, 3:603], wide.transpose(0, 1)):
        check({"gate_up": view})
        y = triton.forward(view)
        assert torch.equal(triton.backward([y], view)[0], triton.backward([y], view.contiguous())[0])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("gate", [-1e4, -100.0, -87.5, 0.0, 1e4])
def test_hostile_gates(dtype, gate):
    gate_up = make(9, 128, dtype=dtype)["gate_up"].cuda()
    gate_up[:, :64] = gate
    y = triton.forward(gate_up)
    assert y.isfinite().all()
    exact = reference.swiglu(gate_up.double())
    within_budget(y, exact.to(dtype), exact)
    assert triton.backward([torch.ones_like(y)], gate_up)[0].isfinite().all()


def test_more_than_2_to_the_31_elements():
    """11 GB: the last rows are as those of a small tensor."""
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        pytest.skip("wants 14 GB of GPU memory")
    gate_up = torch.zeros(75776, 28672, dtype=BF16, device="cuda")
    assert gate_up.numel() > 1 << 31
    last = make(8, 28672, dtype=BF16)["gate_up"].cuda()
    gate_up[-8:] = last
    y = triton.forward(gate_up)
    assert torch.equal(y[-8:], triton.forward(last))
    assert not y[:-8].any()
    dy = torch.ones_like(y)
    del y
    (found,) = triton.backward([dy], gate_up)
    (expected,) = triton.backward([dy[-8:]], last)
    assert torch.equal(found[-8:], expected)


def test_captured_in_a_graph():
    gate_up = make(333, 2 * 8192, dtype=BF16)["gate_up"].cuda()

    def both():
        y = triton.forward(gate_up)
        return y, *triton.backward([y], gate_up)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    gate_up.mul_(-3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_compiles_without_a_graph_break():
    x = make(37, 128, dtype=BF16)["gate_up"].cuda().requires_grad_()

    def step(gate_up):
        return swiglu(gate_up * 2).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))
