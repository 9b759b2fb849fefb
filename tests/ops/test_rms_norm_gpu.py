"""The Triton kernels of rms_norm on a GPU, through the public op and autograd, against float64."""

import pytest
import torch

from hylo_ops.rms_norm import triton
from tests.ops.test_rms_norm import BF16, DTYPES, EPS, FP32, check_triton, make, norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
DIMS = [(1, 1), (3, 1001, 2048), (501, 3072), (2, 301, 4096), (150, 8192), (2, 333, 16, 128), (999, 64), (77, 333)]


def on_gpu(x):
    return {name: t.cuda() for name, t in x.items()}


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_forward_and_gradients(dtypes, dims):
    of_x, of_residual, of_weight, of_y = dtypes
    options = {"dtype": of_x, "residual_dtype": of_residual, "weight_dtype": of_weight}
    check_triton(on_gpu(make(*dims, with_residual=of_residual is not None, **options)), of_y)


def test_heads_within_a_projection():
    x = on_gpu(make(2, 333, 3072, with_residual=False, dtype=BF16))["x"][..., 512:2560].unflatten(-1, (16, 128))
    weight = torch.linspace(-2, 2, 128, device="cuda")
    check_triton({"x": x, "weight": weight})
    y, _, rstd = triton.forward(x, weight, None, EPS, None)
    results = [triton.backward(y, None, t, weight, rstd, BF16) for t in (x, x.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(size):
    x = on_gpu(make(33, 128, with_residual=False, dtype=torch.float16))
    x["x"] = x["x"].sign() * size
    y, _, rstd = triton.forward(x["x"], x["weight"] * 1e-2, None, EPS, None)
    dy = torch.ones_like(y) / 1024
    assert all(t.isfinite().all() for t in (y, rstd))
    assert all(t.isfinite().all() for t in triton.backward(dy, None, x["x"], x["weight"] * 1e-2, rstd, torch.float16))


def test_all_that_is_allocated_is_written():
    """NaN in fresh memory and in memory before and after x."""
    x = on_gpu(make(1000, 333, dtype=BF16, residual_dtype=FP32))
    torch.use_deterministic_algorithms(True)
    try:
        wide = torch.full((1002, 333), float("nan"), device="cuda", dtype=BF16)
        wide[1:-1] = x["x"]
        y, total, rstd = triton.forward(wide[1:-1], x["weight"], x["residual"], EPS, None)
        found = triton.backward(y, total, total, x["weight"], rstd, BF16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for t in (y, total, rstd, *found))


def test_captured_in_a_graph():
    x = on_gpu(make(333, 2048, dtype=BF16, residual_dtype=FP32))

    def both():
        y, total, rstd = triton.forward(x["x"], x["weight"], x["residual"], EPS, None)
        return y, total, *triton.backward(y, total, total, x["weight"], rstd, BF16)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x["x"].mul_(-3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, both(), strict=True))


def test_nothing_is_kept_beside_the_total():
    x = {name: t.requires_grad_() for name, t in on_gpu(make(4096, 2048, dtype=BF16, residual_dtype=FP32)).items()}
    norm(None)(**x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y, total = norm(None)(**x)
    numbers = 4096 * 2048
    assert torch.cuda.memory_allocated() - before <= numbers * (2 + 4) + 4096 * 4 + 2048
    del y, total


def test_compiles_without_a_graph_break():
    x = {name: t.requires_grad_() for name, t in on_gpu(make(2, 37, 128, dtype=BF16, residual_dtype=FP32)).items()}

    def step(*values):
        y, total = norm(None)(**dict(zip(x, values, strict=True)))
        return y.float().square().sum() + total.sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = tuple(x.values())
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(step(*leaves), leaves))
