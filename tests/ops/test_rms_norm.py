"""rms_norm: definition, gradients, the residual, error budget, strided views, registration, rejected inputs."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import rms_norm, rms_norm_of_stream
from hylo_ops.testing import cast, gradients, within_budget

EPS = 1e-5
DTYPE = torch.float64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def make(*dims, with_residual=True, dtype=DTYPE, residual_dtype=None, weight_dtype=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    dims = dims or (2, 7, 24)
    x = {"x": torch.randn(dims, generator=g, dtype=DTYPE).to(dtype)}
    x["weight"] = torch.randn(dims[-1], generator=g, dtype=DTYPE).to(weight_dtype or dtype)
    if with_residual:
        x["residual"] = torch.randn(dims, generator=g, dtype=DTYPE).to(residual_dtype or dtype)
    return x


def plain(x, weight, residual=None, eps=EPS, dtype=None):
    """The definition through PyTorch's own norm, as a layer of a model has it."""
    total = x if residual is None else (residual + x).to(residual.dtype)
    y = F.rms_norm(total, (total.shape[-1],), eps=eps) * weight
    y = y.to(dtype or x.dtype)
    return y if residual is None else (y, total)


def run(x, **options):
    return rms_norm(**x, eps=EPS, **options)


def norm(backend, dtype=None):
    return lambda **x: rms_norm(**x, eps=EPS, dtype=dtype, backend=backend)


def check_triton(x, dtype=None):
    """Forward and backward within the budget, and the same bits twice: on a GPU and in the interpreter."""
    ours, eager, exact = norm("triton", dtype), norm("reference", dtype), norm("reference")
    wide = cast(x, torch.float64)
    results = [f(**given) for f, given in ((ours, x), (eager, x), (exact, wide))]
    for name, *values in zip(("y", "total"), *(r if isinstance(r, tuple) else (r,) for r in results), strict=False):
        assert values[0].is_contiguous()
        within_budget(*values, name)
    found = gradients(ours, x, list(x), BF16)
    again = gradients(ours, x, list(x), BF16)
    theirs, right = gradients(eager, x, list(x), BF16), gradients(exact, wide, list(x), BF16)
    for name in x:
        assert found[name].dtype == x[name].dtype
        assert torch.equal(found[name], again[name]), name
        within_budget(found[name], theirs[name], right[name], name)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dims", [(2, 7, 24), (1, 1), (5,), (3, 1, 2, 128), (2, 0, 8)])
def test_equals_the_definition(dims, with_residual):
    x = make(*dims, with_residual=with_residual)
    torch.testing.assert_close(run(x), plain(**x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dims", [(2, 3, 5), (5,), (0, 5)])
def test_gradients(dims, with_residual):
    x = {name: value.requires_grad_() for name, value in make(*dims, with_residual=with_residual).items()}
    assert torch.autograd.gradcheck(lambda *values: run(dict(zip(x, values, strict=True))), tuple(x.values()))


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_where_one_result_is_used(used):
    x = make(2, 3, 5)
    ours = gradients(lambda **kw: run(kw)[used], x, list(x))
    exact = gradients(lambda **kw: plain(**kw)[used], x, [name for name in x if name != "weight" or used == 0])
    for name in exact:
        torch.testing.assert_close(ours[name], exact[name], rtol=0, atol=1e-12)
    if used == 1:
        assert (ours["weight"] == 0).all()


# dtypes of x, residual, weight and y; None: no residual
DTYPES = [
    (BF16, None, BF16, BF16),
    (BF16, None, FP32, BF16),
    (FP32, None, FP32, BF16),
    (FP16, None, FP16, FP16),
    (FP32, None, FP32, FP32),
    (BF16, FP32, FP32, BF16),
    (BF16, BF16, BF16, BF16),
    (FP32, BF16, FP32, FP32),
    (FP32, FP32, FP32, BF16),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))
def test_error_budget(dtypes):
    of_x, of_residual, of_weight, of_y = dtypes
    x = make(2, 37, 64, with_residual=of_residual is not None, dtype=of_x, residual_dtype=of_residual,
             weight_dtype=of_weight)  # fmt: skip
    names = ("y",) if of_residual is None else ("y", "total")
    ours, eager, exact = (
        dict(zip(names, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))
        for outputs in (run(x, dtype=of_y), plain(**x, dtype=of_y), plain(**cast(x, DTYPE)))
    )
    for name in names:
        within_budget(ours[name], eager[name], exact[name], name)
    assert ours["y"].dtype == of_y
    ours = gradients(lambda **kw: run(kw, dtype=of_y), x, list(x), BF16)
    eager = gradients(lambda **kw: plain(**kw, dtype=of_y), x, list(x), BF16)
    exact = gradients(plain, cast(x, DTYPE), list(x), BF16)
    for name in x:
        assert ours[name].dtype == x[name].dtype
        within_budget(ours[name], eager[name], exact[name], name)


def test_y_is_of_the_total_that_is_returned():
    x = make(4, 64, dtype=BF16)
    y, total = run(x)
    assert torch.equal(y, run({"x": total, "weight": x["weight"]}))


def test_neither_x_nor_the_residual_is_kept_beside_the_total():
    x = {name: value.requires_grad_() for name, value in make(4, 64, dtype=BF16, residual_dtype=FP32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = run(x)
    assert sorted(tuple(t.shape) for t in kept) == [(4,), (4, 64), (64,)]
    assert total.data_ptr() in {t.data_ptr() for t in kept}


@pytest.mark.parametrize("size", [0.0, 1e-4, 60000.0])
def test_hostile_sizes_stay_finite(size):
    """Half precision whose squares over- or underflow."""
    x = make(2, 7, 24, with_residual=False, dtype=FP16)
    x["x"] = x["x"].sign() * size
    within_budget(run(x), *[plain(**cast(x, DTYPE))] * 2)
    grads = gradients(lambda **kw: run(kw), cast(x, FP32), list(x))
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_strided_views():
    """Heads of one projection, normed where they lie; a residual whose last dim is not contiguous."""
    views = {
        "x": torch.randn(2, 7, 40, dtype=DTYPE)[..., 8:32].unflatten(-1, (3, 8)),
        "residual": torch.randn(8, 3, 7, 2, dtype=DTYPE).permute(3, 2, 1, 0),
        "weight": torch.randn(8, 2, dtype=DTYPE)[:, 0],
    }
    assert all(t.is_contiguous() for t in run(views))
    moved = {"x": views["x"].permute(2, 3, 0, 1), "weight": torch.randn(7, dtype=DTYPE)}
    assert run(moved).is_contiguous()
    expected = run({name: view.contiguous() for name, view in views.items()})
    torch.testing.assert_close(run(views), expected, rtol=0, atol=1e-12)
    ours, exact = (gradients(partial(f, eps=EPS), views, list(views)) for f in (rms_norm, plain))
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_residual", [True, False])
def test_registration(with_residual):
    x = make(2, 3, 8, with_residual=with_residual, dtype=FP32)
    leaves = [value.requires_grad_() for value in x.values()]
    arguments = (*leaves, *([] if with_residual else [None]), EPS, BF16, None)
    torch.library.opcheck(torch.ops.hylo_ops.rms_norm, arguments)


def test_what_the_fakes_say_of_the_backward_is_so():
    x = make(2, 3, 8, dtype=FP32)
    total, dy, dtotal = (t.permute(2, 1, 0) for t in torch.randn(3, 8, 3, 2))
    for x_dtype in (FP32, BF16):
        arguments = (dy, dtotal, total, x["weight"], torch.rand(2, 3), x_dtype, "reference")
        torch.library.opcheck(torch.ops.hylo_ops.rms_norm_backward, arguments)
        assert all(t.is_contiguous() for t in torch.ops.hylo_ops.rms_norm_backward(*arguments))


def test_compiles_without_a_graph_break():
    x = {name: value.requires_grad_() for name, value in make(dtype=BF16, residual_dtype=FP32).items()}

    def step(*values):
        y, total = run(dict(zip(x, values, strict=True)))
        return y.float().square().sum() + total.sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = tuple(x.values())
    found = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(step(*leaves), leaves))


def test_on_meta():
    x = {name: value.to("meta") for name, value in make(dtype=BF16, residual_dtype=FP32).items()}
    y, total = run(x)
    assert (y.shape, y.dtype, total.dtype, y.device.type) == (x["x"].shape, BF16, FP32, "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x must have shape \[..., D\], got \[\]"),
        ({"x": torch.zeros(2, 7, 24, dtype=torch.int32)}, "x must be bfloat16 or .*, got int32"),
        ({"weight": torch.zeros(7)}, r"weight must have shape \[24\], got \[7\]"),
        ({"residual": torch.zeros(7, 24)}, r"residual must have shape \[2, 7, 24\], got \[7, 24\]"),
        ({"residual": torch.zeros(2, 7, 24, dtype=torch.int64)}, "residual must be .*, got int64"),
        ({"dtype": torch.int8}, "dtype must be one of .*, got torch.int8"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        run({**make(dtype=FP32), **change})


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        run(make(), backend="tpu")


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_stream_that_goes_on_has_the_gradients_of_both(dtype, used):
    """The norm's bits, the input itself behind it, and the sum of two gradients."""
    x = make(2, 7, 24, with_residual=False, dtype=FP32)

    def of(function, **inputs):
        return tuple(function(**inputs)[i] for i in used)

    y, stream = rms_norm_of_stream(**x, eps=EPS, dtype=dtype)
    assert torch.equal(y, rms_norm(**x, eps=EPS, dtype=dtype))
    assert stream.data_ptr() == x["x"].data_ptr()
    wanted = ["x", "weight"] if 0 in used else ["x"]
    ours = gradients(partial(of, partial(rms_norm_of_stream, eps=EPS, dtype=dtype)), x, wanted)
    eager = gradients(partial(of, lambda x, weight: (plain(x, weight, dtype=dtype), x)), x, wanted)
    exact = gradients(partial(of, lambda x, weight: (plain(x, weight), x)), cast(x, DTYPE), wanted)
    for name in wanted:
        assert ours[name].dtype == FP32
        within_budget(ours[name], eager[name], exact[name], name)


def test_a_stream_that_goes_on_in_float64():
    x = {name: value.requires_grad_() for name, value in make(2, 3, 5, with_residual=False).items()}
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_of_stream(x, weight, eps=EPS), tuple(x.values()))
