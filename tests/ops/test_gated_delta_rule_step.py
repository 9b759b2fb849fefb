"""fused.gated_delta_rule_step: equals the plain step with its activations outside, pools, registration, bad inputs."""

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import recurrent_gated_delta_rule
from hylo_ops.fused import gated_delta_rule_step
from hylo_ops.testing import cast, within_budget

BACKENDS = ["reference"]
DTYPE = torch.float64
B, G, H, K, V = 3, 2, 4, 8, 12
SCALE = 0.35


def make(dtype=DTYPE, rows=B, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "q": normal(B, 1, G, K),
        "k": normal(B, 1, G, K),
        "v": normal(B, 1, H, V),
        "a": normal(B, 1, H),
        "b": normal(B, 1, H),
        "A_log": normal(H),
        "dt_bias": normal(H) - 3,
        "state": normal(rows, H, K, V).to(DTYPE if dtype == DTYPE else torch.float32),
    }


def activated(x, qk_l2norm=True, allow_neg_eigval=False):
    """The plain step's tensors, written down from the definition."""
    q, k = x["q"], x["k"]
    if qk_l2norm:
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    g = -x["A_log"].exp() * F.softplus(x["a"] + x["dt_bias"])
    beta = x["b"].sigmoid() * (1 + allow_neg_eigval)
    return q, k, x["v"], g, beta


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_l2norm", [True, False])
@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_equals_the_plain_step(backend, qk_l2norm, allow_neg_eigval):
    x = make()
    options = {"qk_l2norm": qk_l2norm, "allow_neg_eigval": allow_neg_eigval}
    state = x["state"].clone()
    expected = recurrent_gated_delta_rule(*activated(x, **options), state)
    o = gated_delta_rule_step(**x, **options, backend=backend)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(x["state"], state, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_with_padding(backend):
    x = make(rows=6)
    before = x["state"].clone()
    indices = torch.tensor([5, -1, 2])
    o = gated_delta_rule_step(**x, scale=SCALE, state_indices=indices, backend=backend)
    state = before[[5, 0, 2]].clone()
    expected = recurrent_gated_delta_rule(*activated(x), state, scale=SCALE)
    torch.testing.assert_close(o[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(x["state"][[5, 2]], state[[0, 2]], rtol=0, atol=1e-12)
    assert not o[1].any()
    assert torch.equal(x["state"][[0, 1, 3, 4]], before[[0, 1, 3, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_settled_state_changes_nothing(backend):
    x, other = make(), make()
    o = gated_delta_rule_step(**x, backend=backend, settled_state=True)
    assert torch.equal(o, gated_delta_rule_step(**other, backend=backend))
    assert torch.equal(x["state"], other["state"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(backend, dtype):
    """Against a layer that activates in the inputs' dtype first."""
    x = make(dtype)
    exact, eager = cast(x, DTYPE), x["state"].clone()
    o_exact = gated_delta_rule_step(**exact, backend="reference")
    o_eager = recurrent_gated_delta_rule(*activated(x), eager)
    o = gated_delta_rule_step(**x, backend=backend)
    assert o.dtype == dtype
    within_budget(o, o_eager, o_exact, "o")
    within_budget(x["state"], eager, exact["state"], "state")


def test_registration():
    x = make(torch.float32)
    for indices, settled in ((None, False), (torch.tensor([2, -1, 0], dtype=torch.int32), True)):
        arguments = (*x.values(), SCALE, indices, True, False, settled, None)
        torch.library.opcheck(torch.ops.hylo_ops.gated_delta_rule_step, arguments)


def test_compiles_without_a_graph_break():
    x = make(torch.float32)
    ours, eager = x["state"].clone(), x["state"].clone()

    def step(state):
        return gated_delta_rule_step(**(x | {"state": state})), state.sum()  # reads what the step has just written

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ours), step(eager))
    torch.testing.assert_close(ours, eager)
    assert not torch.equal(ours, x["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, 1, G, 9)}, r"k must have shape \[3, 1, 2, 8\], got \[3, 1, 2, 9\]"),
        ({"a": torch.zeros(B, 1, G)}, r"a must have shape \[3, 1, 4\], got \[3, 1, 2\]"),
        ({"b": torch.zeros(B, H)}, r"b must have shape \[3, 1, 4\], got \[3, 4\]"),
        ({"A_log": torch.zeros(G)}, r"A_log must have shape \[4\], got \[2\]"),
        ({"dt_bias": torch.zeros(H, dtype=torch.int32)}, "dt_bias must be bfloat16 or .*, got int32"),
        ({"state": torch.zeros(B, H, K, 9)}, r"state must have shape \[B, 4, 8, 12\], got \[3, 4, 8, 9\]"),
        ({"state": torch.zeros(2, H, K, V)}, r"state must have one row a sequence \(3\), got 2"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule_step(**(make(torch.float32) | change))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_named_backend_says_why_it_cannot_run(backend):
    with pytest.raises(NotImplementedError, match=f"{backend}: .* is on cpu, not on a CUDA device"):
        gated_delta_rule_step(**make(torch.float32), backend=backend)
