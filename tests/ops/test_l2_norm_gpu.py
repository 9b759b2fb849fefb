"""The Triton kernels of l2_norm on a GPU, through the public op and autograd, against float64."""

from functools import partial

import pytest
import torch

from hylo_ops import l2_norm
from hylo_ops.l2_norm import triton
from hylo_ops.testing import within_budget
from tests.ops.budgets import check_within_budget
from tests.ops.test_l2_norm import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DIMS = [(2, 1001, 6, 256), (333, 16, 128), (1001, 32, 64), (777, 16), (33, 100), (5, 512), (3, 8192), (1, 3)]


def keys(dtype=BF16):
    """Of all heads, as a convolution over queries, keys and values leaves them."""
    return make(2, 1001, 6144, dtype=dtype)["x"].cuda()[..., 1536:3072].unflatten(-1, (6, 256))


def check(x):
    check_within_budget(partial(l2_norm, backend="triton"), partial(l2_norm, backend="reference"), x)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_forward_and_gradients(dtype, dims):
    check({"x": make(*dims, dtype=dtype)["x"].cuda()})


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_strided_views(dtype):
    x = keys(dtype)
    for view in (x, x[:, ::3], x.transpose(1, 2), x[..., 1:200]):
        check({"x": view})
        y, scale = triton.forward(view, 1e-6)
        given = [y + 1], [scale]
        assert torch.equal(triton.backward(*given, view, 1e-6)[0], triton.backward(*given, view.contiguous(), 1e-6)[0])


def test_no_copy_of_a_view_is_made():
    x = keys()
    triton.forward(x, 1e-6)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, scale = triton.forward(x, 1e-6)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + scale.nbytes + 4096


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(dtype, size):
    x = make(33, 24, dtype=dtype)["x"].cuda().sign() * size
    exact = l2_norm(x.double(), backend="reference")
    y, scale = triton.forward(x, 1e-6)
    within_budget(y, exact.to(dtype), exact)
    assert triton.backward([torch.ones_like(y) / 1024], [scale], x, 1e-6)[0].isfinite().all()


def test_captured_in_a_graph():
    x = keys()

    def both():
        y, scale = triton.forward(x, 1e-6)
        return y, *triton.backward([x.contiguous()], [scale], x, 1e-6)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.mul_(-3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_compiles_without_a_graph_break():
    x = make(2, 37, 6, 64, dtype=BF16)["x"].cuda().requires_grad_()

    def step(x):
        return l2_norm(x * 2).float().sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(step(x), x))
