"""fused.mamba2_step: equals the block's definition, pools, error budget, registration, rejected inputs."""

import pytest
import torch

from hylo_ops import fused
from hylo_ops.fused import mamba2, mamba2_step
from hylo_ops.testing import cast, within_budget
from tests.ops.mamba2_cases import EPS, KINDS, LIMIT, H, K, V, W, make, plain

DTYPE = torch.float64
B = 3


def step_inputs(kind="hylo", rows=B, dtype=DTYPE):
    """One token a sequence, and states of so many rows."""
    x = make(kind, 1, N=max(rows, B), dtype=dtype)
    for name in ("z", "xbc", "dt"):
        x[name] = x[name][:B]
    x["conv_state"], x["state"] = x["conv_state"][:rows], x.pop("initial_state")[:rows]
    return x


def expected(x, **options):
    states = {"conv_state": x["conv_state"], "initial_state": x["state"]}
    return plain(**{name: t for name, t in x.items() if name != "state"} | states, **options)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("dt_limit", [None, LIMIT])
def test_equals_the_definition(kind, norm_before_gate, dt_limit):
    x, options = step_inputs(kind), {"norm_before_gate": norm_before_gate, "dt_limit": dt_limit}
    wanted = expected(x, **options)
    y = mamba2_step(**x, **options, backend="reference")
    for got, want in zip((y, x["conv_state"], x["state"]), wanted, strict=True):
        close(got, want)


def test_options_left_out():
    x, bare = step_inputs(), step_inputs()
    x |= {name: torch.zeros_like(x[name]) for name in ("conv_bias", "d", "dt_bias")}
    y = mamba2_step(**x)
    bare |= {"conv_bias": None}
    del bare["d"], bare["dt_bias"]
    close(mamba2_step(**bare), y)
    close(bare["state"], x["state"])


def test_a_step_without_softplus():
    x, other = step_inputs(), step_inputs()
    other["dt"] = (other["dt"] + other["dt_bias"]).exp().log1p() - other["dt_bias"]
    close(mamba2_step(**other, dt_softplus=False), mamba2_step(**x))


def test_a_pool_with_padding():
    x = step_inputs(rows=6)
    before = {name: x[name].clone() for name in ("conv_state", "state")}
    single = x | {name: t[[5, 0, 2]].clone() for name, t in before.items()}
    wanted = mamba2_step(**single)
    y = mamba2_step(**x, state_indices=torch.tensor([5, -1, 2]))
    close(y[[0, 2]], wanted[[0, 2]])
    assert not y[1].any()
    for name, t in before.items():
        close(x[name][[5, 2]], single[name][[0, 2]])
        assert torch.equal(x[name][[0, 1, 3, 4]], t[[0, 1, 3, 4]])


def test_a_settled_state_changes_nothing():
    x, other = step_inputs(), step_inputs()
    assert torch.equal(mamba2_step(**x, settled_state=True), mamba2_step(**other))
    for name in ("conv_state", "state"):
        assert torch.equal(x[name], other[name])


def composed(**x):
    """The three ops one after the other, as other GPUs have it."""
    names = ("z", "xbc", "dt", "conv_weight", "conv_bias", "a", "norm_weight", "conv_state", "state", "d", "dt_bias")
    dims = (x["d_state"], x["x_heads"], x["b_heads"])
    options = (True, None, x["eps"], False, False)
    return mamba2._composed(*(x[name] for name in names), x.get("state_indices"), *dims, *options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_composition_is_the_same(kind):
    x, other = step_inputs(kind), step_inputs(kind)
    close(composed(**x), mamba2_step(**other))
    close(x["state"], other["state"])
    close(x["conv_state"], other["conv_state"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype):
    """Of what rounds once, against what rounds after each op."""
    x = step_inputs(dtype=dtype)
    exact, eager = cast(x, DTYPE), x | {name: x[name].clone() for name in ("conv_state", "state")}
    y_exact, y_eager, y = mamba2_step(**exact), composed(**eager), mamba2_step(**x)
    assert y.dtype == dtype
    within_budget(y, y_eager, y_exact, "y")
    within_budget(x["state"], eager["state"], exact["state"], "state")
    assert torch.equal(x["conv_state"], exact["conv_state"].to(dtype))


def test_a_half_precision_state_is_rounded_once():
    x = step_inputs(dtype=torch.float32)
    x["state"], x["conv_state"] = x["state"].bfloat16(), x["conv_state"].bfloat16()
    wide = x | {"state": x["state"].float(), "conv_state": x["conv_state"].float()}
    x["xbc"] = wide["xbc"] = x["xbc"].bfloat16().float()
    assert torch.equal(mamba2_step(**x), mamba2_step(**wide))
    assert torch.equal(x["state"], wide["state"].bfloat16())
    assert torch.equal(x["conv_state"], wide["conv_state"].bfloat16())


def test_registration():
    x = step_inputs(dtype=torch.float32)
    names = ("z", "xbc", "dt", "conv_weight", "conv_bias", "a", "norm_weight", "conv_state", "state", "d", "dt_bias")
    dims = (x["d_state"], x["x_heads"], x["b_heads"])
    for indices, settled in ((None, False), (torch.tensor([2, -1, 0], dtype=torch.int32), True)):
        arguments = (*(x[name] for name in names), indices, *dims, True, [0.0, 1.0], EPS, False, settled, None)
        torch.library.opcheck(torch.ops.hylo_ops.mamba2_step, arguments)


def test_compiles_without_a_graph_break():
    x = step_inputs(dtype=torch.float32)
    ours, eager = x["state"].clone(), x["state"].clone()

    def step(state):
        y = mamba2_step(**(x | {"state": state, "conv_state": x["conv_state"].clone()}))
        return y, state.sum()  # reads what the step has just written

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ours), step(eager))
    torch.testing.assert_close(ours, eager)
    assert not torch.equal(ours, x["state"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(B, H, V)}, r"z must have shape \[B, T, H, V\], got \[3, 4, 6\]"),
        ({"z": torch.zeros(B, 2, H, V), "xbc": torch.zeros(B, 2, 30), "dt": torch.zeros(B, 2, H)}, "z must hold one t"),
        ({"xbc": torch.zeros(B, 1, 30).half()}, "xbc must be float32, got float16"),
        ({"xbc": torch.zeros(B, 1, 31)}, r"conv_weight must have shape \[31, W\], got \[30, 4\]"),
        ({"dt": torch.zeros(B, H)}, r"dt must have shape \[3, 1, 4\], got \[3, 4\]"),
        ({"conv_weight": torch.zeros(30, 5)}, r"the width of conv_weight must be one of \[2, 3, 4\], got 5"),
        ({"conv_bias": torch.zeros(29)}, r"conv_bias must have shape \[30\], got \[29\]"),
        ({"a": torch.zeros(3)}, r"a must have shape \[4\], got \[3\]"),
        ({"d": torch.zeros(3)}, r"d must have shape \[4\], got \[3\]"),
        ({"norm_weight": torch.zeros(24)}, r"norm_weight must have shape \[NG, H V / NG\], got \[24\]"),
        ({"norm_weight": torch.zeros(3, 8)}, "the heads of z must be a multiple of the rows of norm_weight, got .* 3"),
        ({"norm_weight": torch.zeros(2, 8)}, r"norm_weight must have shape \[2, 12\], got \[2, 8\]"),
        ({"x_heads": 3}, "the heads of z must be a multiple of x_heads, got the heads of z 4 and x_heads 3"),
        ({"b_heads": 0}, "the heads of z must be a multiple of b_heads, got the heads of z 4 and b_heads 0"),
        (
            {"d_state": 4},
            "xbc must have .* a multiple of d_state for c, got 30 with x_heads 2, V 6, b_heads 2, d_state 4",
        ),
        ({"b_heads": 1}, "the heads of z must be a multiple of the heads of c, got the heads of z 4 and the .* 5"),
        ({"dt_limit": (2.0, 1.0)}, r"dt_limit must be \(least, greatest\), got \(2.0, 1.0\)"),
        ({"state": torch.zeros(B, H, K, V)}, r"state must have shape \[B, 4, 6, 3\], got \[3, 4, 3, 6\]"),
        ({"state": torch.zeros(2, H, V, K)}, r"state must have one row a sequence \(3\), got 2"),
        ({"state": torch.zeros(B, H, V, K).half()}, "state must be float32 or .*, got float16"),
        ({"conv_state": torch.zeros(2, 30, W)}, r"conv_state must have shape \[3, 30, 4\], got \[2, 30, 4\]"),
        ({"conv_state": torch.zeros(B, 30, W, dtype=torch.int32)}, "conv_state must be .*, got int32"),
        ({"state_indices": torch.zeros(2, dtype=torch.int32)}, r"state_indices must have shape \[3\], got \[2\]"),
        ({"state_indices": torch.zeros(3)}, "state_indices must be int32 or int64, got float32"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        mamba2_step(**(step_inputs(dtype=torch.float32) | change))


@pytest.mark.parametrize("backend", ["cuda", "composed"])
def test_a_named_backend_says_why_it_cannot_run(backend):
    with pytest.raises(NotImplementedError, match=f"{backend}: z is on cpu, not on a CUDA device"):
        mamba2_step(**step_inputs(), backend=backend)


@pytest.mark.parametrize("function", [fused.mamba2_step, fused.mamba2_scan])
def test_they_say_what_they_take_and_raise(function):
    for section in ("Dims:", "Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
        assert section in function.__doc__
