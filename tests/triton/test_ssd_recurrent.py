"""The decode step of ssd in Triton against the recurrence in float64."""

import pytest
import torch

from hylo_ops import recurrent_ssd
from hylo_ops.testing import within_budget
from tests.triton.ssd_cases import DTYPES, NAMES, TOKENWISE, exact, make, steps


def step(inputs, state, backend="triton", dt_softplus=True, **options):
    tensors = {name: inputs[name] for name in NAMES}
    return recurrent_ssd(**tensors, state=state, dt_softplus=dt_softplus, backend=backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "K"), [(16, 16), (80, 48), (16, 256)])
def test_one_step(dtype, state_dtype, V, K):
    inputs = make(B=1, T=1, H=2, V=V, K=K, dtype=dtype)
    inputs["initial_state"] = inputs["initial_state"].to(state_dtype)
    o_exact, state_exact = exact(inputs)
    state, eager = (inputs["initial_state"].clone() for _ in range(2))
    o, o_eager = step(inputs, state), step(inputs, eager, "reference")
    assert (o.dtype, state.dtype) == (dtype, state_dtype)
    within_budget(o, o_eager, o_exact, "o")
    within_budget(state, eager, state_exact, "state")


@pytest.mark.parametrize("heads", [(4, 1, 1), (2, 2, 4), (2, 4, 1)], ids=str)
def test_shared_heads(heads):
    inputs = make(B=2, T=1, H=4, heads=heads)
    o_exact, state_exact = exact(inputs)
    o_eager, state_eager = steps(inputs)
    state = inputs["initial_state"].clone()
    within_budget(step(inputs, state), o_eager, o_exact, "o")
    within_budget(state, state_eager, state_exact, "state")


@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.4, 1.5)), (False, None), (False, (0.3, torch.inf))])
def test_steps(softplus, limit):
    inputs = make(T=1)
    inputs |= {"dt": inputs["dt"].abs(), "dt_bias": inputs["dt_bias"].abs()}
    o_exact, state_exact = exact(inputs, dt_softplus=softplus, dt_limit=limit)
    state = inputs["initial_state"].clone()
    o = step(inputs, state, dt_softplus=softplus, dt_limit=limit)
    torch.testing.assert_close(o, o_exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_exact.float(), rtol=1e-5, atol=1e-5)


def test_options_left_out():
    inputs = make(B=1, T=1)
    zeros = {name: torch.zeros(2) for name in ("d", "dt_bias")}
    states = [inputs["initial_state"].clone() for _ in range(2)]
    assert torch.equal(step(inputs | dict.fromkeys(zeros), states[0]), step(inputs | zeros, states[1]))
    assert torch.equal(*states)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pool_with_padding(index_dtype):
    inputs = make(B=3, T=1, H=1, heads=(1, 1, 1))
    inputs["x"][1] = torch.nan  # padding is not read
    pool = torch.full((5, 1, 16, 16), torch.nan)
    pool[[4, 0]] = inputs["initial_state"][[0, 2]]
    o = step(inputs, pool, state_indices=torch.tensor([4, -1, 0], dtype=index_dtype))
    assert not o[1].any()
    assert pool[1:4].isnan().all()
    for row, n in [(4, 0), (0, 2)]:
        alone = inputs | {name: inputs[name][n : n + 1] for name in TOKENWISE}
        state = inputs["initial_state"][n : n + 1].clone()
        assert torch.equal(o[n : n + 1], step(alone, state))
        assert torch.equal(pool[row : row + 1], state)


@pytest.mark.parametrize("dt", [0.0, 100.0, 1e30])
def test_gates(dt):
    """exp(-200) and less empties the state; a step of 0 leaves it as it is."""
    inputs = make(B=1, T=1)
    inputs["a"][:], inputs["dt"][:], inputs["dt_bias"][:] = -2, dt, 0
    o_exact, state_exact = exact(inputs, dt_softplus=False)
    state = inputs["initial_state"].clone()
    torch.testing.assert_close(step(inputs, state, dt_softplus=False), o_exact.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_exact.float(), rtol=1e-5, atol=1e-5)


def test_strided_views():
    """Slices of one projection, steps between elements, every second head of a pool, states with V last."""
    inputs = make(T=1, heads=(2, 1, 2))
    state = inputs["initial_state"].clone()
    o = step(inputs, state)
    views = inputs | {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in NAMES}
    wide = torch.stack([inputs["initial_state"]] * 2, 2)
    turned = inputs["initial_state"].mT.contiguous().mT
    for same in (wide[:, :, 0], turned):
        assert torch.equal(step(views, same), o)
        assert torch.equal(same, state)
    assert torch.equal(wide[:, :, 1], inputs["initial_state"])


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"K": 24}, "K is 24, not a multiple of 16 up to 256"),
        ({"V": 20}, "V is 20, not a multiple of 16"),
        ({"dtype": torch.float64}, "x is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_cannot_run(sizes, reason):
    inputs = make(T=1, **sizes)
    with pytest.raises(NotImplementedError, match=reason):
        step(inputs, inputs["initial_state"])


def test_a_state_in_float64():
    inputs = make(T=1)
    with pytest.raises(NotImplementedError, match="the state is float64"):
        step(inputs, inputs["initial_state"].double())


def test_registration():
    """In the interpreter backend=None takes Triton."""
    inputs = make(B=1, T=1)
    arguments = (*(inputs[name] for name in NAMES[:5]), inputs["initial_state"], inputs["d"], inputs["dt_bias"])
    torch.library.opcheck(torch.ops.hylo_ops.recurrent_ssd, (*arguments, None, True, None, None))
