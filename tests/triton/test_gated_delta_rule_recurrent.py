"""The decode step of gated_delta_rule in Triton against the recurrence in float64."""

import pytest
import torch

from hylo_ops import recurrent_gated_delta_rule
from hylo_ops.fused import gated_delta_rule_step
from hylo_ops.gated_delta_rule import reference
from hylo_ops.testing import within_budget
from tests.triton.gated_delta_rule_cases import DTYPES, NAMES, exact, make

SCALE = 0.3


def step(inputs, state, **options):
    return recurrent_gated_delta_rule(
        *(inputs[name] for name in NAMES), state, scale=SCALE, backend="triton", **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (48, 80), (128, 64), (256, 32)])
def test_one_step(dtype, state_dtype, K, V):
    inputs = make(T=1, G=2, H=4, K=K, V=V, dtype=dtype)
    inputs["initial_state"] = inputs["initial_state"].to(state_dtype)
    o_exact, state_exact = exact(inputs, SCALE)
    state, eager = (inputs["initial_state"].clone() for _ in range(2))
    o = step(inputs, state)
    o_eager = reference.recurrent_gated_delta_rule(*(inputs[name] for name in NAMES), eager, SCALE, None)
    assert (o.dtype, state.dtype) == (dtype, state_dtype)
    within_budget(o, o_eager, o_exact, "o")
    within_budget(state, eager, state_exact, "state")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk_l2norm", "allow_neg_eigval"), [(True, False), (False, True)])
def test_activations_inside(dtype, qk_l2norm, allow_neg_eigval):
    inputs = make(T=1, G=2, H=4, K=48, V=80, dtype=dtype)
    q, k, v, a, b = (inputs[name] for name in NAMES)
    a = 3 * (a + 1)  # of either sign
    A_log, dt_bias = torch.linspace(-2, 2, 4), torch.tensor([-30.0, -3, 0, 30])
    states = [inputs["initial_state"].clone() for _ in range(2)] + [inputs["initial_state"].double()]
    options = {"scale": SCALE, "qk_l2norm": qk_l2norm, "allow_neg_eigval": allow_neg_eigval}
    tensors = (3 * q, k / 3, v, a, b, A_log, dt_bias)
    o = gated_delta_rule_step(*tensors, states[0], **options, backend="triton")
    o_eager = gated_delta_rule_step(*tensors, states[1], **options, backend="reference")
    o_exact = gated_delta_rule_step(*(t.double() for t in tensors), states[2], **options, backend="reference")
    within_budget(o, o_eager, o_exact, "o")
    within_budget(states[0], states[1], states[2], "state")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_pool_with_padding(index_dtype):
    inputs = make(B=3, T=1)
    inputs["v"][1] = torch.nan  # padding is not read
    pool = torch.full((5, 2, 16, 16), torch.nan)
    pool[[4, 0]] = inputs["initial_state"][[0, 2]]
    o = step(inputs, pool, state_indices=torch.tensor([4, -1, 0], dtype=index_dtype))
    assert not o[1].any()
    assert pool[1:4].isnan().all()
    for row, n in [(4, 0), (0, 2)]:
        alone = {name: inputs[name][n : n + 1] for name in NAMES}
        state = inputs["initial_state"][n : n + 1].clone()
        assert torch.equal(o[n : n + 1], step(alone, state))
        assert torch.equal(pool[row : row + 1], state)


@pytest.mark.parametrize("gate", [-torch.inf, -100.0, 0.0])
def test_gates(gate):
    inputs = make(T=1)
    inputs["g"][:] = gate
    o_exact, state_exact = exact(inputs, SCALE)
    state = inputs["initial_state"].clone()
    torch.testing.assert_close(step(inputs, state), o_exact.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, state_exact.float(), rtol=1e-5, atol=1e-6)


def test_strided_views():
    """Slices of one projection, and every second head of a pool."""
    inputs = make(B=3, T=1, H=4, G=2)
    views = inputs | {name: torch.stack([inputs[name]] * 2, 2)[:, :, 0] for name in NAMES}
    wide = torch.stack([inputs["initial_state"]] * 2, 2)
    state = inputs["initial_state"].clone()
    assert torch.equal(step(views, wide[:, :, 0]), step(inputs, state))
    assert torch.equal(wide[:, :, 0], state)
    assert torch.equal(wide[:, :, 1], inputs["initial_state"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.zeros(2, 1, 1, 24), "k": torch.zeros(2, 1, 1, 24)}, "K is 24, not a multiple of 16 up to 256"),
        ({"q": torch.zeros(2, 1, 1, 288), "k": torch.zeros(2, 1, 1, 288)}, "K is 288, not a multiple"),
        ({"v": torch.zeros(2, 1, 2, 20)}, "V is 20, not a multiple of 16"),
        ({"q": torch.zeros(2, 1, 1, 16).double()}, "q is torch.float64, not bfloat16, float16 or float32"),
        ({"k": torch.zeros(2, 1, 1, 16).half()}, "q, k and v are torch.float32, torch.float16 and torch.float32"),
        ({"v": torch.zeros(2, 1, 2, 32)[..., ::2]}, "the last dim of v is not contiguous"),
    ],
)
def test_what_it_cannot_run(change, reason):
    inputs = make(T=1) | change
    state = torch.zeros(2, 2, inputs["q"].shape[3], inputs["v"].shape[3])
    with pytest.raises(NotImplementedError, match=reason):
        step(inputs, state)


def test_states_that_are_not_contiguous():
    with pytest.raises(NotImplementedError, match="the states of heads are not contiguous: the strides of state are"):
        step(make(T=1), torch.zeros(2, 2, 16, 16).mT)


def test_registration():
    """In the interpreter backend=None takes Triton."""
    inputs = make(T=1)
    torch.library.opcheck(torch.ops.hylo_ops.recurrent_gated_delta_rule, (*inputs.values(), SCALE, None, None))
