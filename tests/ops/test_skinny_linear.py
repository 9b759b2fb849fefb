"""skinny_linear and skinny_linear_add_: definition, error budget, views, registration, rejected inputs."""

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import skinny_linear, skinny_linear_add_
from hylo_ops.testing import cast, within_budget

DTYPE = torch.float64
KINDS = ["plain", "swiglu", "add"]


def make(*rows, N=24, K=48, kind="plain", dtype=DTYPE, device="cpu"):
    """x [*rows, K], weights whose products are of size 1, and for `add` a residual."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    x = {"x": normal(*rows, K), "weight": normal(2 * N if kind == "swiglu" else N, K) * K**-0.5}
    if kind == "add":
        x["residual"] = normal(*rows, N)
    return {name: tensor.to(dtype) for name, tensor in x.items()}


def ours(kind, x, weight, residual=None, **options):
    """The op on a copy of the residual."""
    if kind == "add":
        into = residual.clone()
        y = skinny_linear_add_(into, x, weight, **options)
        assert y is into
        return y
    return skinny_linear(x, weight, swiglu=kind == "swiglu", **options)


def plain(kind, x, weight, residual=None):
    """Eager PyTorch."""
    y = F.linear(x, weight)
    if kind == "add":
        return torch.addmm(residual.flatten(0, -2), x.flatten(0, -2), weight.T).view(residual.shape)
    if kind == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y


def check_within_budget(kind, x, **options):
    """No further from float64 than twice eager PyTorch."""
    y = ours(kind, **x, **options)
    assert y.dtype == x["x"].dtype
    within_budget(y, plain(kind, **x), plain(kind, **cast(x, torch.float64)), kind)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(1,), (64,), (2, 3), (4, 1, 5), (1, 1)], ids=str)
def test_equals_the_definition(rows, kind):
    x = make(*rows, kind=kind)
    torch.testing.assert_close(ours(kind, **x), plain(kind, **x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("swiglu", [False, True])
def test_one_row_may_be_a_vector(swiglu):
    x = make(kind="swiglu" if swiglu else "plain")
    y = skinny_linear(**x, swiglu=swiglu)
    assert y.shape == (24,)
    torch.testing.assert_close(y, skinny_linear(x["x"][None], x["weight"], swiglu=swiglu)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype, kind):
    check_within_budget(kind, make(5, N=64, K=333, kind=kind, dtype=dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_rounded_once(kind):
    """The result in bf16 is that in float64 of the same numbers, rounded, but where that is between two."""
    x = make(9, N=64, K=256, kind=kind, dtype=torch.bfloat16)
    exact = plain(kind, **cast(x, torch.float64))
    assert (ours(kind, **x) == exact.bfloat16()).float().mean() > 0.99


@pytest.mark.parametrize("gate", [-1e4, -100.0, 0.0, 1e4])
def test_hostile_gates_stay_finite(gate):
    x = make(3, K=4, kind="swiglu", dtype=torch.float32)
    x["x"][:, 0], x["weight"][:24] = 1, 0
    x["weight"][:24, 0] = gate
    assert check_within_budget("swiglu", x).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_strided_views(kind):
    x = make(6, 5, K=48, kind=kind)
    views = {
        "x": torch.stack([x["x"].transpose(0, 1)] * 2, -1)[..., 0].transpose(0, 1)[::2],
        "weight": x["weight"].T.contiguous().T,
    }
    if kind == "add":
        views["residual"] = x["residual"][::2]
    y = ours(kind, **views)
    torch.testing.assert_close(y, plain(kind, **{n: t.contiguous() for n, t in views.items()}), rtol=0, atol=1e-12)
    assert kind == "add" or y.is_contiguous()


def test_a_residual_with_gaps_keeps_what_lies_between():
    x = make(3, kind="add")
    wide = torch.full((3, 40), 7.0, dtype=DTYPE)
    into = wide[:, 8:32]
    into.copy_(x["residual"])
    assert skinny_linear_add_(into, x["x"], x["weight"]) is into
    torch.testing.assert_close(into, plain("add", **x), rtol=0, atol=1e-12)
    assert (wide[:, :8] == 7).all()
    assert (wide[:, 32:] == 7).all()


@torch.no_grad()
def test_weights_that_want_a_gradient_are_taken_without_one():
    x = make(2)
    y = skinny_linear(x["x"], torch.nn.Parameter(x["weight"]))
    assert not y.requires_grad


@pytest.mark.parametrize("name", ["x", "weight", "residual"])
def test_gradients_are_refused(name):
    x = make(2, kind="add")
    x[name].requires_grad_()
    message = f"{name} must not require a gradient, which this op has none of, got one that does"
    with pytest.raises(ValueError, match=message):
        skinny_linear_add_(**x)
    if name != "residual":
        with pytest.raises(ValueError, match=message):
            skinny_linear(x["x"], x["weight"])


@pytest.mark.parametrize("swiglu", [False, True])
def test_registration_of_the_product(swiglu):
    x = make(2, 3, kind="swiglu", dtype=torch.float32)
    torch.library.opcheck(torch.ops.hylo_ops.skinny_linear, (x["x"], x["weight"], swiglu, False, None))


def test_registration_of_the_sum():
    x = make(2, 3, kind="add", dtype=torch.float32)
    torch.library.opcheck(torch.ops.hylo_ops.skinny_linear_add_, (x["x"], x["weight"], x["residual"], False, None))


@torch.no_grad()
def test_compiles_without_a_graph_break():
    x = make(2, 3, N=48, kind="add", dtype=torch.float32)

    def step(x, weight, residual):
        wide = skinny_linear(2 * x, weight.repeat(2, 1), swiglu=True)
        return skinny_linear_add_(residual.clone(), wide, weight) + wide

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), step(**x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x must have shape \[..., K\], got \[\]"),
        ({"x": torch.zeros(5, 13, 48)}, r"x must have 1 to 64 rows in all, got 65 in \[5, 13, 48\]"),
        ({"x": torch.zeros(0, 48)}, r"x must have 1 to 64 rows in all, got 0 in \[0, 48\]"),
        ({"x": torch.zeros(2, 48, dtype=torch.int32)}, "x must be bfloat16 or .*, got int32"),
        ({"weight": torch.zeros(24, 47)}, r"weight must have shape \[N, 48\], got \[24, 47\]"),
        ({"weight": torch.zeros(24, 48).half()}, "weight must be float32, got float16"),
        ({"weight": torch.zeros(24, 48, device="meta")}, r"weight must be on the device of x \(cpu\), got meta"),
        ({"residual": torch.zeros(2, 23)}, r"residual must have shape \[2, 24\], got \[2, 23\]"),
        ({"residual": torch.zeros(2, 24).double()}, "residual must be float32, got float64"),
        ({"residual": torch.zeros(2, 24, device="meta")}, r"residual must be on the device of x \(cpu\), got meta"),
    ],
)
def test_rejected_inputs(change, message):
    x = make(2, kind="add", dtype=torch.float32) | change
    with pytest.raises(ValueError, match=message):
        skinny_linear_add_(**x)
    if "residual" not in change:
        with pytest.raises(ValueError, match=message):
            skinny_linear(x["x"], x["weight"])


def test_rejected_halves():
    with pytest.raises(ValueError, match=r"weight must have shape \[2 N, K\] with swiglu, got \[25, 48\]"):
        skinny_linear(torch.zeros(2, 48), torch.zeros(25, 48), swiglu=True)
    with pytest.raises(ValueError, match=r"weight must have shape \[2 N, 48\], got \[24, 8\]"):
        skinny_linear(torch.zeros(2, 48), torch.zeros(24, 8), swiglu=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_named_backend_that_is_not_there(kind):
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        ours(kind, **make(2, kind=kind), backend="tpu")
