"""ssd: definition, gradients, packed sequences, split state, decode, hostile inputs, registration, rejected inputs."""

import itertools

import pytest
import torch

from hylo_ops import chunk_ssd, recurrent_ssd
from hylo_ops.ssd import reference
from hylo_ops.testing import cast, gradients, within_budget

BACKENDS = ["reference"]
KINDS = {"hylo": (2, 2, 4), "mamba2": (4, 1, 1), "grouped": (4, 2, 2), "full": (4, 4, 4)}  # heads of x, b, c, of H = 4
LIMIT = (0.01, 1.5)
DTYPE = torch.float64


def make(B=2, T=37, kind="hylo", H=4, V=5, K=6, dtype=DTYPE, seed=0):
    g = torch.Generator().manual_seed(seed)
    x_heads, b_heads, c_heads = KINDS[kind]
    shapes = {
        "x": (B, T, x_heads, V),
        "dt": (B, T, H),
        "a": (H,),
        "b": (B, T, b_heads, K),
        "c": (B, T, c_heads, K),
        "d": (H,),
        "dt_bias": (H,),
        "initial_state": (B, H, V, K),
    }
    inputs = {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}
    return {**inputs, "a": -inputs["a"].exp()}


def by_steps(inputs, dt_softplus=True, dt_limit=None):
    return reference.step_by_step(**inputs, dt_softplus=dt_softplus, dt_limit=dt_limit)


def close(got, expected, atol=1e-10):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def plain(x, dt, a, b, c, d, dt_bias, initial_state, dt_softplus=True, dt_limit=LIMIT):
    """The recurrence of the paper with nothing of ours in it; differentiable."""
    x, b, c = (t.repeat_interleave(4 // t.shape[2], dim=2) for t in (x, b, c))
    steps = (dt + dt_bias).exp().log1p() if dt_softplus else dt + dt_bias
    steps = steps.clamp(*(dt_limit or (None, torch.inf)))
    state, o = initial_state, []
    for t in range(x.shape[1]):
        decay = (steps[:, t] * a).exp()[..., None, None]
        state = decay * state + torch.einsum("bh,bhv,bhk->bhvk", steps[:, t], x[:, t], b[:, t])
        o.append(torch.einsum("bhvk,bhk->bhv", state, c[:, t]) + d[:, None] * x[:, t])
    return torch.stack(o, dim=1), state


@pytest.mark.parametrize("dt_softplus", [True, False])
@pytest.mark.parametrize("dt_limit", [None, LIMIT])
def test_the_step_form_is_the_recurrence(dt_softplus, dt_limit):
    x = make(T=9)
    close(by_steps(x, dt_softplus, dt_limit), plain(**x, dt_softplus=dt_softplus, dt_limit=dt_limit), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 63, 64, 131])
def test_equals_the_definition(backend, kind, T):
    x = make(T=T, kind=kind)
    close(chunk_ssd(**x, dt_softplus=True, backend=backend), by_steps(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dt_limit", [None, LIMIT, (0.0, float("inf"))])
def test_step_without_softplus_and_with_limits(backend, dt_limit):
    x = make(T=70)
    x["dt"] = x["dt"].abs()
    x["dt_bias"] = x["dt_bias"].abs()
    expected = plain(**x, dt_softplus=False, dt_limit=dt_limit)
    close(chunk_ssd(**x, dt_limit=dt_limit, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_left_out(backend):
    x = make(T=70)
    bare = {name: x[name] for name in ("x", "dt", "a", "b", "c")}
    zeros = {name: torch.zeros_like(x[name]) for name in ("d", "dt_bias", "initial_state")}
    close(chunk_ssd(**bare, dt_softplus=True, backend=backend), by_steps({**bare, **zeros}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    x = make(T=0)
    state = x["initial_state"].requires_grad_()
    o, final = chunk_ssd(**x, backend=backend)
    assert o.shape == (2, 0, 4, 5)
    assert torch.equal(final, state)
    final.sum().backward()
    assert torch.equal(state.grad, torch.ones_like(state))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["hylo", "mamba2"])
def test_gradients(backend, kind):
    x = {name: value.requires_grad_() for name, value in make(B=1, T=3, kind=kind, V=2, K=2).items()}

    def call(*tensors):
        return chunk_ssd(**dict(zip(x, tensors, strict=True)), dt_softplus=True, dt_limit=LIMIT, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_over_several_chunks(backend):
    x = make(B=1, T=131, V=3, K=3)
    got = gradients(lambda **kw: chunk_ssd(**kw, dt_softplus=True, dt_limit=LIMIT, backend=backend), x, list(x))
    expected = gradients(plain, x, list(x))
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(backend, dtype):
    """At most twice the error of the step form, which keeps its state in fp32 as we do."""
    x = make(B=1, T=131, V=8, K=8, dtype=torch.float32)
    x = {**cast(x, dtype, keep=("dt", "a", "d", "dt_bias", "initial_state")), "a": x["a"].clamp(max=-0.3)}
    exact = by_steps(cast(x, DTYPE))
    ours, eager = chunk_ssd(**x, dt_softplus=True, backend=backend), by_steps(x)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for name, one, other, best in zip(("o", "final_state"), ours, eager, exact, strict=True):
        within_budget(one, other, best, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_single_ones(backend):
    bounds = [0, 5, 5, 6, 71, 80]
    x = make(B=1, T=bounds[-1])
    x["initial_state"] = torch.randn(len(bounds) - 1, 4, 5, 6, dtype=DTYPE)
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, final = chunk_ssd(**x, dt_softplus=True, cu_seqlens=cu, backend=backend)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        one = {name: x[name][:, begin:end] for name in ("x", "dt", "b", "c")}
        alone = {**x, **one, "initial_state": x["initial_state"][n : n + 1]}
        o_n, final_n = chunk_ssd(**alone, dt_softplus=True, backend=backend)
        assert torch.equal(o[:, begin:end], o_n)
        assert torch.equal(final[n : n + 1], final_n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_packed_sequences(backend):
    bounds = [0, 5, 5, 70]
    x = make(B=1, T=bounds[-1], V=3, K=3)
    x["initial_state"] = torch.randn(3, 4, 3, 3, dtype=DTYPE)
    cu = torch.tensor(bounds, dtype=torch.int32)

    def apart(initial_state, **x):
        parts = []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            tokens = {name: x[name][:, begin:end] for name in ("x", "dt", "b", "c")}
            state = initial_state[n : n + 1]
            parts.append(chunk_ssd(**{**x, **tokens}, initial_state=state, dt_softplus=True, backend=backend))
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([state for _, state in parts])

    together = gradients(lambda **kw: chunk_ssd(**kw, cu_seqlens=cu, dt_softplus=True, backend=backend), x, list(x))
    expected = gradients(apart, x, list(x))
    for name, grad in together.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_two_parts_equal_the_whole(backend, cut):
    x = make(T=131)
    whole, final = chunk_ssd(**x, dt_softplus=True, backend=backend)
    head, tail = ({name: x[name][:, part] for name in ("x", "dt", "b", "c")} for part in (slice(cut), slice(cut, None)))
    first, state = chunk_ssd(**{**x, **head}, dt_softplus=True, backend=backend)
    second, last = chunk_ssd(**{**x, **tail, "initial_state": state}, dt_softplus=True, backend=backend)
    close((torch.cat([first, second], 1), last), (whole, final))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 131, 138])
def test_batch_invariance(backend, T):
    x = make(B=3, T=T, V=7, K=9, dtype=torch.float32)
    whole = chunk_ssd(**x, dt_softplus=True, fixed_split=True, backend=backend)
    close(whole, chunk_ssd(**x, dt_softplus=True, backend=backend), atol=1e-3)
    for n in range(3):
        alone = {name: value[n : n + 1] if value.ndim > 1 else value for name, value in x.items()}
        o_n, final_n = chunk_ssd(**alone, dt_softplus=True, fixed_split=True, backend=backend)
        assert torch.equal(whole[0][n : n + 1], o_n)
        assert torch.equal(whole[1][n : n + 1], final_n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_chunks(backend, kind):
    x = make(T=9, kind=kind)
    expected, final = chunk_ssd(**x, dt_softplus=True, dt_limit=LIMIT, backend=backend)
    state = x.pop("initial_state").clone()
    for t in range(9):
        now = {name: x[name][:, t : t + 1] for name in ("x", "dt", "b", "c")}
        o = recurrent_ssd(**{**x, **now}, state=state, dt_softplus=True, dt_limit=LIMIT, backend=backend)
        close([o], [expected[:, t : t + 1]])
    close([state], [final])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", [torch.float64, torch.bfloat16])
def test_decode_from_a_pool_with_padding(backend, state_dtype):
    x = make(B=3, T=1)
    x.pop("initial_state")
    pool = torch.randn(5, 4, 5, 6, dtype=DTYPE).to(state_dtype)
    pool[1:4] = torch.nan  # rows that nobody uses
    before = pool.clone()
    indices = torch.tensor([4, -1, 0], dtype=torch.int32)
    o = recurrent_ssd(**x, state=pool, state_indices=indices, dt_softplus=True, backend=backend)
    expected, final = chunk_ssd(**x, initial_state=before[[4, 0, 0]].double(), dt_softplus=True)
    close([o[[0, 2]], pool[[4, 0]]], [expected[[0, 2]], final[[0, 2]].to(state_dtype)])
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    torch.testing.assert_close(pool[1:4], before[1:4], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a", [-1e30, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_gates_forget_and_spoil_nothing(backend, a, dtype):
    """One head forgets all at once, the weak gates of the others keep their precision beside it."""
    x = make(T=131, dtype=dtype)
    x["a"][0] = a
    got, expected = chunk_ssd(**x, dt_softplus=True, backend=backend), by_steps(cast(x, DTYPE))
    close([t.double() for t in got], expected, atol=1e-10 if dtype == torch.float64 else 1e-4)
    step = torch.nn.functional.softplus(x["dt"][:, -1, 0] + x["dt_bias"][0])
    written = torch.einsum("b,bv,bk->bvk", step, x["x"][:, -1, 0], x["b"][:, -1, 0])
    close([got[1][:, 0]], [written], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_strong_gate_between_weak_ones(backend):
    """A difference of running sums would lose the weak gates behind 1e6."""
    x = make(B=1, T=40)
    x["a"][:] = -0.01
    x["dt"] = torch.full_like(x["dt"], 0.5)
    x["dt"][:, 7] = 1e8
    single = cast(x, torch.float32)
    o, final = chunk_ssd(**single, dt_softplus=True, backend=backend)
    steps = by_steps(single)
    exact = by_steps(x)
    within_budget(o, steps[0], exact[0], "o")
    within_budget(final, steps[1], exact[1], "final_state")


@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_steps_have_finite_gradients(backend):
    x = make(T=70, dtype=torch.float32)
    x["dt"][:, ::3] = 1e4
    x["dt"][:, 1::3] = -1e4  # softplus gives a step of 0
    x["a"][:] = -1e3
    grads = gradients(lambda **kw: chunk_ssd(**kw, dt_softplus=True, backend=backend), x, list(x))
    assert set(grads) == set(x)
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    x = make()
    packed = torch.randn(2, 37, 40, dtype=DTYPE)
    views = {
        "x": packed[..., 1:11].unflatten(-1, (2, 5)),
        "b": packed[..., 11:35:2].unflatten(-1, (2, 6)),
        "dt": packed[..., 35:39],
        "initial_state": x["initial_state"].mT.contiguous().mT,
    }
    got = chunk_ssd(**{**x, **views}, backend=backend, dt_softplus=True)
    expected = chunk_ssd(**{**x, **{n: v.contiguous() for n, v in views.items()}}, dt_softplus=True, backend=backend)
    close(got, expected, atol=0)


def positional(x, cu=None, dt_limit=None):
    return (*x.values(), cu, True, dt_limit, False, True, None)


def test_registration():
    x = make(B=1, T=5, V=2, K=3, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in x.items()}
    torch.library.opcheck(torch.ops.hylo_ops.chunk_ssd, positional(leaves, dt_limit=[0.0, float("inf")]))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    bare = {**leaves, "d": None, "dt_bias": None, "initial_state": None}
    torch.library.opcheck(torch.ops.hylo_ops.chunk_ssd, positional(bare, cu=cu))
    one = [x[name][:, :1].detach() if name in ("x", "dt", "b", "c") else x[name].detach() for name in list(x)[:5]]
    indices = torch.tensor([1], dtype=torch.int32)
    arguments = (*one, torch.randn(2, 4, 2, 3), x["d"].detach(), None, indices, True, [0.0, 2.0], None)
    torch.library.opcheck(torch.ops.hylo_ops.recurrent_ssd, arguments)


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)
    a = x.pop("a").requires_grad_()

    def step(tokens):
        o, state = chunk_ssd(**{**x, "x": tokens}, a=a, dt_softplus=True, dt_limit=(0.0, float("inf")))
        state = state.detach()
        now = {name: x[name][:, :1] for name in ("x", "dt", "b", "c")}
        after = recurrent_ssd(**now, a=a.detach(), state=state, dt_softplus=True)
        return (o + after).square().sum() + state.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x["x"]), step(x["x"]))
    (grad,) = torch.autograd.grad(compiled(x["x"]), a)
    (expected,) = torch.autograd.grad(step(x["x"]), a)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 37, 5)}, r"x must have shape \[B, T, HX, V\], got \[2, 37, 5\]"),
        ({"x": torch.zeros(2, 37, 2, 5, dtype=torch.int32)}, "x must be bfloat16 or .*, got int32"),
        ({"dt": torch.zeros(2, 36, 4)}, r"dt must have shape \[2, 37, H\], got \[2, 36, 4\]"),
        ({"x": torch.zeros(2, 37, 3, 5)}, "heads of dt must be a multiple of the heads of x, got .* 4 and .* 3"),
        ({"b": torch.zeros(2, 37, 8, 6)}, "heads of dt must be a multiple of the heads of b, got .* 4 and .* 8"),
        ({"c": torch.zeros(2, 37, 4, 7)}, r"c must have shape \[2, 37, G, 6\], got \[2, 37, 4, 7\]"),
        ({"b": torch.zeros(2, 37, 2, 6, dtype=torch.float16)}, "b must be float32, got float16"),
        ({"a": torch.zeros(1)}, r"a must have shape \[4\], got \[1\]"),
        ({"d": torch.zeros(4, 5)}, r"d must have shape \[4\], got \[4, 5\]"),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias must have shape \[4\], got \[3\]"),
        ({"dt_limit": (2.0, 1.0)}, r"dt_limit must be \(least, greatest\), got \(2.0, 1.0\)"),
        ({"initial_state": torch.zeros(2, 4, 6, 5)}, r"initial_state must have shape \[2, 4, 5, 6\], got \[2, 4, 6"),
        ({"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}, "batch must be 1, got 2"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        chunk_ssd(**{**make(dtype=torch.float32), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 2}, "x must hold one token a sequence, got 2"),
        ({"state": torch.zeros(3, 4, 5, 6)}, r"state must have one row a sequence \(2\), got 3"),
        ({"state": torch.zeros(2, 4, 6, 5)}, r"state must have shape \[B, 4, 5, 6\], got \[2, 4, 6, 5\]"),
        ({"state": torch.zeros(2, 4, 5, 6, dtype=torch.float16)}, "state must be float32 or .*, got float16"),
        ({"state_indices": torch.zeros(3, dtype=torch.int32)}, r"state_indices must have shape \[2\], got \[3\]"),
    ],
)
def test_rejected_decode_inputs(change, message):
    x = make(T=change.pop("T", 1), dtype=torch.float32)
    state = x.pop("initial_state")
    with pytest.raises(ValueError, match=message):
        recurrent_ssd(**{**x, "state": state, **change})


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'rocm'"):
        chunk_ssd(**make(), backend="rocm")
