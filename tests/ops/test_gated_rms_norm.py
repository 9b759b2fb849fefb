"""gated_rms_norm: definition, gradients, hostile inputs, error budget, registration, rejected inputs."""

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import cubin, gated_rms_norm
from hylo_ops.backend import choose
from hylo_ops.gated_rms_norm.op import BACKENDS as ALL_BACKENDS
from hylo_ops.testing import cast, gradients, within_budget

BACKENDS = ["reference"]
ORDERS = [True, False]
EPS = 1e-5
DTYPE = torch.float64


def make(B=2, T=7, H=3, V=8, per_head=False, dtype=DTYPE, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(B, T, H, V, generator=g, dtype=dtype),
        "gate": torch.randn(B, T, H, V, generator=g, dtype=dtype),
        "weight": torch.randn(*([H, V] if per_head else [V]), generator=g, dtype=dtype),
    }


def plain(x, gate, weight, norm_before_gate, eps=EPS):
    """The definition through PyTorch's own norm."""
    inner = x if norm_before_gate else x * F.silu(gate)
    y = F.rms_norm(inner, (x.shape[3],), eps=eps) * weight
    return y * F.silu(gate) if norm_before_gate else y


def run(x, norm_before_gate, backend=None, eps=EPS):
    return gated_rms_norm(**x, eps=eps, norm_before_gate=norm_before_gate, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("shape", [(2, 7, 3, 8), (1, 1, 1, 1), (3, 1, 2, 33), (1, 37, 6, 512), (2, 0, 3, 8)])
def test_equals_the_definition(backend, order, per_head, shape):
    x = make(*shape, per_head)
    torch.testing.assert_close(run(x, order, backend), plain(**x, norm_before_gate=order), rtol=0, atol=1e-12)


def test_the_order_and_the_sharing_of_the_weight_matter():
    x = make(per_head=True)
    assert not torch.allclose(run(x, True), run(x, False))
    heads = [run({**x, "weight": x["weight"][h]}, True)[:, :, h] for h in range(3)]
    torch.testing.assert_close(torch.stack(heads, dim=2), run(x, True), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_head", [True, False])
def test_gradients(backend, order, per_head):
    x = {name: value.requires_grad_() for name, value in make(1, 2, 2, 3, per_head).items()}

    def call(x, gate, weight):
        return gated_rms_norm(x, gate, weight, eps=EPS, norm_before_gate=order, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(backend, order, dtype):
    x = make(2, 37, 3, 64, per_head=not order, dtype=dtype)
    y = run(x, order, backend)
    assert y.dtype == dtype
    within_budget(y, plain(**x, norm_before_gate=order), plain(**cast(x, DTYPE), norm_before_gate=order), "y")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_error_budget_of_the_gradients(backend, order, dtype):
    x = make(2, 37, 3, 64, per_head=not order, dtype=dtype)
    ours = gradients(lambda **kw: run(kw, order, backend), x, list(x))
    eager = gradients(lambda **kw: plain(**kw, norm_before_gate=order), x, list(x))
    exact = gradients(lambda **kw: plain(**kw, norm_before_gate=order), cast(x, DTYPE), list(x))
    for name in x:
        assert ours[name].dtype == dtype
        within_budget(ours[name], eager[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_weight_in_fp32_beside_bf16_inputs(backend, order):
    x = cast(make(per_head=True), torch.bfloat16)
    x["weight"] = x["weight"].float()
    got = gradients(lambda **kw: run(kw, order, backend), x, list(x))
    assert run(x, order, backend).dtype == torch.bfloat16
    assert {name: grad.dtype for name, grad in got.items()} == {name: value.dtype for name, value in x.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
@pytest.mark.parametrize("gate", [-1e4, 0.0, 1e4])
def test_hostile_sizes_stay_finite(backend, order, size, gate):
    """Half precision whose squares over- or underflow, gates that are shut or wide open."""
    x = make(dtype=torch.float16)
    x["x"] = x["x"].sign() * size
    x["gate"] = torch.full_like(x["gate"], gate)
    x["weight"] = torch.full_like(x["weight"], 1e-2)
    within_budget(run(x, order, backend), *[plain(**cast(x, DTYPE), norm_before_gate=order)] * 2)
    grads = gradients(lambda **kw: run(kw, order, backend), cast(x, torch.float32), list(x))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
def test_strided_views(backend, order):
    """x and gate side by side in one projection, and heads that stand apart."""
    both = torch.randn(2, 7, 3, 20, dtype=DTYPE)
    views = {"x": both[..., 1:9], "gate": both[..., 10:18], "weight": torch.randn(8, 3, dtype=DTYPE).mT}
    expected = run({name: view.contiguous() for name, view in views.items()}, order, backend)
    torch.testing.assert_close(run(views, order, backend), expected, rtol=0, atol=1e-12)


def test_registration():
    x = make(1, 3, 2, 4, per_head=True, dtype=torch.float32)
    leaves = [value.requires_grad_() for value in x.values()]
    torch.library.opcheck(torch.ops.hylo_ops.gated_rms_norm, (*leaves, EPS, True, None))


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)
    weight = x.pop("weight").requires_grad_()

    def step(tokens, gate):
        return gated_rms_norm(tokens, gate, weight, eps=EPS, norm_before_gate=True).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x.values()), step(*x.values()))
    (grad,) = torch.autograd.grad(compiled(*x.values()), weight)
    (expected,) = torch.autograd.grad(step(*x.values()), weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 7, 24)}, r"x must have shape \[B, T, H, V\], got \[2, 7, 24\]"),
        ({"x": torch.zeros(2, 7, 3, 8, dtype=torch.int32)}, "x must be bfloat16 or .*, got int32"),
        ({"gate": torch.zeros(2, 7, 3, 4)}, r"gate must have shape \[2, 7, 3, 8\], got \[2, 7, 3, 4\]"),
        ({"gate": torch.zeros(2, 7, 3, 8, dtype=torch.float16)}, "gate must be float32, got float16"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \[8\], got \[7\]"),
        ({"weight": torch.zeros(2, 8)}, r"weight must have shape \[3, 8\], got \[2, 8\]"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        run({**make(dtype=torch.float32), **change}, True)


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, for backends to be chosen; nothing runs on it."""

    is_cuda = True

    def get_device(self):
        return 0


CASES_OF_MODELS = [
    (*dims, dtype, weight_dtype, per_head)
    for dims in [(6, 512), (9, 512), (32, 64), (24, 128), (16, 128), (1, 2048), (8, 1024), (1, 8192)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for weight_dtype in {dtype, torch.float32}
    for per_head in (True, False)
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hopper", [True, False])
def test_the_fastest_backend_takes_the_models_both_ways(monkeypatch, hopper, order):
    """cuda where its code runs, else triton, without a look at the CPU's form."""
    monkeypatch.setattr(cubin, "why_not_device", lambda device: None if hopper else "another GPU")
    monkeypatch.setattr(cubin, "why_not_native", lambda: None)
    monkeypatch.setattr(cubin, "why_not_nvrtc", lambda: None)
    assert all(backend.backward is not None for backend in ALL_BACKENDS)
    for H, V, dtype, weight_dtype, per_head in CASES_OF_MODELS:
        x = torch.empty(2, 3, H, V, dtype=dtype).as_subclass(OnGpu)
        weight = torch.empty((H, V) if per_head else V, dtype=weight_dtype).as_subclass(OnGpu)
        arguments = {"x": x, "gate": x, "weight": weight, "eps": EPS, "norm_before_gate": order}
        assert choose("gated_rms_norm", ALL_BACKENDS, None, arguments).name == ("cuda" if hopper else "triton")


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        run(make(), True, "tpu")
