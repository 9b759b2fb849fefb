"""causal_conv1d: definition, gradients, packed sequences, split state, decode, registration, rejected inputs."""

import pytest
import torch

from hylo_ops import causal_conv1d, recurrent_causal_conv1d
from hylo_ops.causal_conv1d import reference

BACKENDS = ["reference"]


def make(B=2, T=37, D=6, W=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(B, T, D, generator=g, dtype=dtype),
        "weight": torch.randn(D, W, generator=g, dtype=dtype),
        "bias": torch.randn(D, generator=g, dtype=dtype),
        "initial_state": torch.randn(B, D, W, generator=g, dtype=dtype),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("T", "W"), [(37, 4), (1, 4), (2, 4), (5, 2), (0, 3)])
def test_equals_the_definition(backend, activation, T, W):
    x = make(T=T, W=W)
    y, state = causal_conv1d(**x, activation=activation, backend=backend)
    if T:
        y_steps, state_steps = reference.step_by_step(x["x"], x["weight"], x["bias"], x["initial_state"], activation)
        torch.testing.assert_close(y, y_steps, rtol=0, atol=1e-10)
        torch.testing.assert_close(state, state_steps, rtol=0, atol=0)
    else:
        assert y.shape == x["x"].shape
        assert torch.equal(state, x["initial_state"])


def test_equals_torch_conv1d():
    x = make()
    y, _ = causal_conv1d(x["x"], x["weight"], x["bias"])
    padded = torch.nn.functional.pad(x["x"].transpose(1, 2), (3, 0))
    expected = torch.nn.functional.conv1d(padded, x["weight"][:, None], x["bias"], groups=6).transpose(1, 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    x = {k: v.requires_grad_() for k, v in make(B=1, T=7, D=3).items()}

    def call(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, activation="silu", backend=backend)

    assert torch.autograd.gradcheck(call, tuple(x.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_single_ones(backend):
    lengths = [5, 0, 1, 11]
    x = make(B=1, T=sum(lengths))
    states = torch.randn(len(lengths), 6, 4, dtype=torch.float64)
    cu = torch.tensor([0, 5, 5, 6, 17], dtype=torch.int32)
    y, final = causal_conv1d(x["x"], x["weight"], x["bias"], initial_state=states, cu_seqlens=cu, backend=backend)
    for n, (begin, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        y_n, final_n = causal_conv1d(
            x["x"][:, begin:end], x["weight"], x["bias"], initial_state=states[n : n + 1], backend=backend
        )
        assert torch.equal(y[:, begin:end], y_n)
        assert torch.equal(final[n : n + 1], final_n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 2, 18])
def test_two_parts_equal_the_whole(backend, cut):
    x = make()
    whole, final = causal_conv1d(**x, activation="silu", backend=backend)
    first, state = causal_conv1d(**{**x, "x": x["x"][:, :cut]}, activation="silu", backend=backend)
    second, last = causal_conv1d(
        x["x"][:, cut:], x["weight"], x["bias"], initial_state=state, activation="silu", backend=backend
    )
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(last, final)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_from_a_pool_with_padding(backend):
    x = make(B=3, T=1)
    pool = torch.randn(5, 6, 4, dtype=torch.float64)
    before = pool.clone()
    indices = torch.tensor([4, -1, 0], dtype=torch.int32)
    y = recurrent_causal_conv1d(x["x"], x["weight"], x["bias"], pool, state_indices=indices, backend=backend)
    expected, final = causal_conv1d(x["x"], x["weight"], x["bias"], initial_state=before[[4, 0, 0]])
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    assert torch.equal(pool[[4, 0]], final[[0, 2]])
    assert torch.equal(pool[1:4], before[1:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_strided_views_and_dtypes(dtype):
    x = make(dtype=dtype)
    wide = torch.randn(2, 37, 12, dtype=dtype)
    y, state = causal_conv1d(wide[..., 3:9], x["weight"], x["bias"], initial_state=x["initial_state"])
    same, same_state = causal_conv1d(
        wide[..., 3:9].contiguous(), x["weight"], x["bias"], initial_state=x["initial_state"]
    )
    assert y.dtype == state.dtype == dtype
    assert torch.equal(y, same)
    assert torch.equal(state, same_state)


def test_registration():
    x = make(B=1, T=5, D=3, dtype=torch.float32)
    leaves = [v.requires_grad_() for v in x.values()]
    torch.library.opcheck(torch.ops.hylo_ops.causal_conv1d, (*leaves, None, "silu", None))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.hylo_ops.causal_conv1d, (leaves[0], leaves[1], None, None, cu, None, None))
    state = torch.randn(1, 3, 4)
    torch.library.opcheck(
        torch.ops.hylo_ops.recurrent_causal_conv1d,
        (leaves[0][:, :1].detach(), leaves[1].detach(), leaves[2].detach(), state, None, "silu", None),
    )


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)
    weight = x["weight"].requires_grad_()

    def step(tokens):
        y, state = causal_conv1d(tokens, weight, activation="silu")
        step = recurrent_causal_conv1d(tokens[:, :1], weight.detach(), None, state.detach())
        return (step + y).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x["x"]), step(x["x"]))
    (grad,) = torch.autograd.grad(compiled(x["x"]), weight)
    (expected,) = torch.autograd.grad(step(x["x"]), weight)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight must have shape \[6, W\], got \[5, 4\]"),
        ({"weight": torch.zeros(6, 5)}, r"width of weight must be one of \[2, 3, 4\], got 5"),
        ({"x": torch.zeros(2, 6)}, r"x must have shape \[B, T, D\], got \[2, 6\]"),
        ({"x": torch.zeros(2, 3, 6, dtype=torch.int32)}, "x must be bfloat16 or .*, got int32"),
        ({"activation": "relu"}, r"activation must be one of \[None, 'silu'\], got 'relu'"),
        ({"initial_state": torch.zeros(3, 6, 4)}, r"initial_state must have shape \[2, 6, 4\], got \[3, 6, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}, "batch must be 1, got 2"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**make(dtype=torch.float32), **change})


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'cuda'"):
        causal_conv1d(make()["x"], make()["weight"], backend="cuda")
