"""The fast backends of gated_rms_norm on a GPU, through the public op and autograd, against float64."""

import pytest
import torch

from hylo_ops import gated_rms_norm
from hylo_ops.gated_rms_norm import cuda, triton
from hylo_ops.testing import cast, gradients, within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BACKENDS = ["cuda", "triton"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ("x", "gate", "weight")
# B, T, H, V, the order; the weight is [H, V] where the gate comes first, as models have it
MODELS = {
    "gdn": (2, 1001, 6, 512, True),
    "mamba2-heads": (2, 1001, 32, 64, False),
    "mamba2-wide-heads": (1, 1001, 24, 128, False),
    "mamba2-group": (2, 501, 1, 2048, False),
    "mamba2-whole": (1, 301, 1, 8192, False),
    "odd": (3, 17, 5, 333, True),
    "widest": (1, 65, 1, 16384, True),
    "one-row": (1, 1, 1, 64, False),
}


def make(B, T, H, V, per_head, dtype, weight_dtype=None):
    g = torch.Generator().manual_seed(0)
    tensors = {"x": (B, T, H, V), "gate": (B, T, H, V), "weight": (H, V) if per_head else (V,)}
    x = {name: torch.randn(shape, generator=g).to("cuda", dtype) for name, shape in tensors.items()}
    x["weight"] = x["weight"].to(weight_dtype or dtype)
    return x


def norm(order, backend):
    return lambda x, gate, weight: gated_rms_norm(x, gate, weight, eps=1e-5, norm_before_gate=order, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("model", MODELS)
def test_forward_and_gradients(backend, dtype, model):
    *dims, order = MODELS[model]
    x = make(*dims, not order, dtype)
    eager, wide = norm(order, "reference"), cast(x, torch.float64)
    y = norm(order, backend)(**x)
    within_budget(y, eager(**x), eager(**wide), "y")
    found = gradients(norm(order, backend), x, NAMES)
    again = gradients(norm(order, backend), x, NAMES)
    eager_gradients, exact = gradients(eager, x, NAMES), gradients(eager, wide, NAMES)
    for name in NAMES:
        within_budget(found[name], eager_gradients[name], exact[name], name)
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [True, False])
def test_a_weight_in_fp32(backend, order):
    x = make(2, 333, 6, 512, not order, torch.bfloat16, torch.float32)
    found = gradients(norm(order, backend), x, NAMES)
    eager = gradients(norm(order, "reference"), x, NAMES)
    exact = gradients(norm(order, "reference"), cast(x, torch.float64), NAMES)
    for name in NAMES:
        assert found[name].dtype == x[name].dtype
        within_budget(found[name], eager[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
@pytest.mark.parametrize("gate", [-1e4, 0.0, 1e4])
def test_hostile_sizes_stay_finite(backend, order, size, gate):
    x = make(1, 33, 2, 64, True, torch.float16)
    x["x"] = x["x"].sign() * size
    x["gate"] = torch.full_like(x["gate"], gate)
    x["weight"] = torch.full_like(x["weight"], 1e-2)
    run = {"cuda": cuda, "triton": triton}[backend]
    assert run.forward(*x.values(), 1e-5, order).isfinite().all()
    dy = torch.ones_like(x["x"]) / 1024
    assert all(g.isfinite().all() for g in run.backward([dy], *x.values(), 1e-5, order))


@pytest.mark.parametrize("order", [True, False])
def test_triton_is_captured_in_a_graph(order):
    x = make(1, 333, 6, 512, False, torch.bfloat16)
    dy = torch.randn_like(x["x"])
    triton.forward(*x.values(), 1e-5, order)
    triton.backward([dy], *x.values(), 1e-5, order)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [triton.forward(*x.values(), 1e-5, order), *triton.backward([dy], *x.values(), 1e-5, order)]
    x["x"].mul_(-3)
    graph.replay()
    wanted = [triton.forward(*x.values(), 1e-5, order), *triton.backward([dy], *x.values(), 1e-5, order)]
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


def test_compiles_without_a_graph_break():
    x = make(2, 37, 6, 64, False, torch.bfloat16)

    def step(tokens, gate, weight):
        return norm(False, None)(tokens, gate, weight).float().square().sum()

    leaves = [t.requires_grad_() for t in x.values()]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), leaves)
    for a, b in zip(found, torch.autograd.grad(step(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)
