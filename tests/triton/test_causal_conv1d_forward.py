"""The forward of causal_conv1d in Triton against the reference in float64."""

import pytest
import torch

from hylo_ops import causal_conv1d
from hylo_ops.testing import cast, within_budget
from tests.triton.causal_conv1d_cases import DTYPES, SMALL, alone, cut, make, packed


@pytest.fixture(autouse=True)
def small_tiles():
    with cut():
        yield


def check(inputs, **options):
    y, state = causal_conv1d(**inputs, **options, backend="triton")
    y_eager, state_eager = causal_conv1d(**inputs, **options, backend="reference")
    y_exact, _ = causal_conv1d(**cast(inputs, torch.float64), **options, backend="reference")
    assert y.dtype == state.dtype == inputs["x"].dtype
    within_budget(y, y_eager, y_exact, "y")
    assert torch.equal(state, state_eager)
    return y, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("W", "activation"), [(2, None), (3, "silu"), (4, "silu")])
def test_dtypes_and_widths(W, activation, dtype):
    check(make(W=W, dtype=dtype), activation=activation)


@pytest.mark.parametrize("T", [0, 1, 3, 4, 16, 19])
def test_lengths(T):
    """Around the width, where all is edges, and around a tile."""
    check(make(B=2, T=T), activation="silu")


@pytest.mark.parametrize("D", [1, 33])
def test_channels(D):
    """Fewer than a program's, and more, with an odd stride."""
    check(make(T=20, D=D), activation="silu")


@pytest.mark.parametrize(("B", "D"), [(0, 8), (2, 0)])
def test_nothing(B, D):
    y, state = causal_conv1d(**make(B=B, D=D), backend="triton")
    assert y.shape == (B, 37, D)
    assert state.shape == (B, D, 4)


def test_without_a_bias_and_a_state():
    check(make() | {"bias": None, "initial_state": None}, activation="silu")


def test_far_from_zero():
    """SiLU is 0 and the identity there, with nothing that overflows on the way."""
    inputs = make()
    inputs["x"] *= torch.logspace(0, 20, 37)[:, None]
    y, _ = check(inputs, activation="silu")
    assert (y.abs() > 1e15).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_and_state(dtype):
    """The state is rounded to the dtype of x, the weights are not."""
    inputs = make()
    check(inputs | {"x": inputs["x"].to(dtype)}, activation="silu")


def test_tiles_do_not_show():
    inputs = make()
    y, _ = causal_conv1d(**inputs, activation="silu", backend="triton")
    for config in (SMALL._replace(length=8, ahead=4, stages=3), SMALL._replace(channels=8, ahead=4)):
        with cut(config):
            assert torch.equal(causal_conv1d(**inputs, activation="silu", backend="triton")[0], y)


@pytest.mark.parametrize("cut_at", [1, 2, 20])
def test_two_parts_equal_the_whole(cut_at):
    inputs = make()
    options = {"activation": "silu", "backend": "triton"}
    y, final = causal_conv1d(**inputs, **options)
    first, state = causal_conv1d(**inputs | {"x": inputs["x"][:, :cut_at]}, **options)
    second, last = causal_conv1d(**inputs | {"x": inputs["x"][:, cut_at:], "initial_state": state}, **options)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "fresh"])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(with_state):
    """More of them than edge programs; some inside a tile, one over several, empty ones at both ends."""
    inputs, cu = packed([0, 5, 0, 0, 1, 40, 3, 2, 8, 0])
    inputs["x"][:, 46:49] = torch.nan
    options = {"activation": "silu", "backend": "triton"}
    given = inputs if with_state else inputs | {"initial_state": None}
    y, final = causal_conv1d(**given, cu_seqlens=cu, **options)
    singles = [
        causal_conv1d(**one if with_state else one | {"initial_state": None}, **options) for one in alone(inputs, cu)
    ]
    assert torch.equal(y.nan_to_num(7), torch.cat([y for y, _ in singles], 1).nan_to_num(7))
    assert torch.equal(final.nan_to_num(7), torch.cat([state for _, state in singles]).nan_to_num(7))
    assert y.isnan().any(2).sum() == 3


@pytest.mark.parametrize("bounds", [torch.int32, torch.int64])
def test_packed_sequences_by_the_reference(bounds):
    inputs, cu = packed([7, 0, 10, 1, 2, 3, 24, 4], dtype=torch.bfloat16)
    check(inputs, activation="silu", cu_seqlens=cu.to(bounds))


def test_strided_views():
    """Slices of a projection, at an even and an odd column; columns first; every other row; tokens that repeat."""
    inputs = make(B=2, T=20)
    y, state = causal_conv1d(**inputs, backend="triton")
    wide = torch.full((2, 20, 40), torch.nan)
    wide[..., 3:19] = wide[..., 24:] = inputs["x"]
    turned, doubled = inputs["x"].mT.contiguous().mT, torch.stack([inputs["x"]] * 2, 2)
    for view in (wide[..., 3:19], wide[..., 24:], turned, doubled[:, :, 0]):
        found = causal_conv1d(**inputs | {"x": view}, backend="triton")
        assert torch.equal(found[0], y)
        assert torch.equal(found[1], state)
    others = {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in ("weight", "bias", "initial_state")}
    assert torch.equal(causal_conv1d(**inputs | others, backend="triton")[0], y)
    check(inputs | {"x": inputs["x"][:, :1].expand(2, 20, 16)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.zeros(1, 37, 16).double()}, "x is torch.float64, not bfloat16, float16 or float32"),
        ({"weight": torch.zeros(16, 4).double()}, "weight is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_cannot_run(change, reason):
    with pytest.raises(NotImplementedError, match=reason):
        causal_conv1d(**make() | change, backend="triton")


def test_registration():
    """In the interpreter backend=None takes Triton."""
    inputs = make(T=3, D=3, W=2)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    torch.library.opcheck(torch.ops.hylo_ops.causal_conv1d, (*leaves, None, "silu", None))
