"""The decode step of causal_conv1d in Triton against the reference in float64."""

import pytest
import torch

from hylo_ops import recurrent_causal_conv1d
from hylo_ops.testing import within_budget
from tests.triton.causal_conv1d_cases import DTYPES, make


def step(inputs, state, backend="triton", **options):
    tensors = {name: inputs[name] for name in ("x", "weight", "bias")}
    return recurrent_causal_conv1d(**tensors, state=state, backend=backend, **{"activation": "silu"} | options)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("W", "D", "activation"), [(2, 1, None), (3, 130, "silu"), (4, 130, "silu")])
def test_one_step(W, D, activation, dtype, state_dtype):
    inputs = make(B=2, T=1, D=D, W=W, dtype=dtype)
    state = inputs["initial_state"].to(state_dtype)
    states = [state.clone(), state.clone()]
    y = step(inputs, states[0], activation=activation)
    y_eager = step(inputs, states[1], "reference", activation=activation)
    # What the state rounds, y is to see.
    wide = {name: tensor.double() for name, tensor in inputs.items()} | {"x": states[1][..., -1].double()[:, None]}
    y_exact = step(wide, state.double(), "reference", activation=activation)
    assert y.dtype == dtype
    within_budget(y, y_eager, y_exact, "y")
    assert torch.equal(*states)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pool_with_padding(index_dtype):
    inputs = make(B=3, T=1)
    inputs["x"][1] = torch.nan  # padding is not read
    pool = torch.full((5, 16, 4), torch.nan)
    pool[[4, 0]] = inputs["initial_state"][[0, 2]]
    y = step(inputs, pool, state_indices=torch.tensor([4, -1, 0], dtype=index_dtype))
    assert not y[1].any()
    assert pool[1:4].isnan().all()
    for row, n in [(4, 0), (0, 2)]:
        state = inputs["initial_state"][n : n + 1].clone()
        assert torch.equal(y[n : n + 1], step(inputs | {"x": inputs["x"][n : n + 1]}, state))
        assert torch.equal(pool[row : row + 1], state)


def test_strided_views():
    """A slice of a projection, columns first, every other row of a pool, a state with channels last."""
    inputs = make(B=2, T=1)
    expected = inputs["initial_state"].clone()
    y = step(inputs, expected)
    views = [torch.cat([inputs["x"]] * 2, -1)[..., 16:], torch.stack([inputs["x"]] * 2, -1)[..., 0]]
    pool = torch.stack([inputs["initial_state"]] * 2, 1)
    for x in views:
        for state in (pool[:, 0].clone(), inputs["initial_state"].mT.contiguous().mT):
            assert torch.equal(step(inputs | {"x": x}, state), y)
            assert torch.equal(state, expected)
    assert torch.equal(step(inputs, pool[:, 0]), y)
    assert torch.equal(pool, torch.stack([expected, inputs["initial_state"]], 1))


def test_without_a_bias():
    inputs = make(B=1, T=1) | {"bias": None}
    states = [inputs["initial_state"].clone() for _ in range(2)]
    zeros = inputs | {"bias": torch.zeros(16)}
    assert torch.equal(step(inputs, states[0]), step(zeros, states[1]))


def test_nothing():
    inputs = make(B=0, T=1)
    assert step(inputs, inputs["initial_state"]).shape == (0, 1, 16)


@pytest.mark.parametrize("name", ["x", "weight"])
def test_float64(name):
    inputs = make(B=1, T=1)
    inputs[name] = inputs[name].double()
    with pytest.raises(NotImplementedError, match=f"{name} is torch.float64, not bfloat16, float16 or float32"):
        step(inputs, inputs["initial_state"])


def test_registration():
    inputs = make(B=1, T=1)
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], inputs["initial_state"], None, "silu", None)
    torch.library.opcheck(torch.ops.hylo_ops.recurrent_causal_conv1d, arguments)
