"""The gradients of causal_conv1d in Triton against those of the reference in float64."""

import pytest
import torch

from hylo_ops import causal_conv1d
from hylo_ops.causal_conv1d import triton_bwd
from hylo_ops.testing import cast, gradients, within_budget
from tests.triton.causal_conv1d_cases import NAMES, SMALL, alone, cut, make, packed

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles():
    with cut():
        yield


def check(inputs, **options):
    wanted = [name for name in NAMES if inputs[name] is not None]
    options = {"activation": "silu"} | options
    ours = gradients(causal_conv1d, inputs | options | {"backend": "triton"}, wanted, torch.bfloat16)
    eager = gradients(causal_conv1d, inputs | options | {"backend": "reference"}, wanted, torch.bfloat16)
    exact = gradients(
        causal_conv1d, cast(inputs, torch.float64) | options | {"backend": "reference"}, wanted, torch.bfloat16
    )
    for name in wanted:
        assert ours[name].dtype == inputs[name].dtype
        within_budget(ours[name], eager[name], exact[name], name)


def backward(inputs, dy, dfinal, cu_seqlens=None):
    """The bare op, with gradients of the outputs as they are given."""
    arguments = [inputs[name] for name in NAMES]
    found = torch.ops.hylo_ops.causal_conv1d_backward([dy, dfinal], *arguments, cu_seqlens, "silu", "triton")
    return dict(zip([name for name in NAMES if inputs[name] is not None], found, strict=True))


def outputs_gradients(inputs):
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(inputs[name].shape, generator=rng).to(inputs[name].dtype) for name in ("x", "initial_state")]


@pytest.mark.parametrize(
    ("W", "dtype", "activation"),
    [
        (2, FP32, "silu"),
        (3, FP16, None),
        (3, FP32, "silu"),
        (4, BF16, "silu"),
        (4, FP16, "silu"),
        (4, FP32, None),
    ],
)
def test_dtypes_and_widths(W, dtype, activation):
    check(make(W=W, dtype=dtype), activation=activation)


@pytest.mark.parametrize("T", [0, 1, 4, 7, 8, 20])
def test_lengths(T):
    """Around the width, where head and tail meet, and around a tile."""
    check(make(B=2, T=T))


def close(found, expected):
    """Equal but for the order of sums over tokens."""
    for name, gradient in found.items():
        tolerance = 1e-5 if name in ("weight", "bias") else 0
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance)


def test_channels():
    """More than a program's, with an odd stride; and one of them alone."""
    inputs = make(T=20, D=33)
    check(inputs)
    dy, dfinal = outputs_gradients(inputs)
    found = backward(inputs, dy, dfinal)
    one = {"x": inputs["x"][..., :1]} | {
        name: inputs[name].narrow(-1 if name == "bias" else -2, 0, 1) for name in NAMES[1:]
    }
    single = backward(one, dy[..., :1], dfinal[:, :1])
    close(single, {name: found[name][tuple(slice(n) for n in single[name].shape)] for name in NAMES})


@pytest.mark.parametrize(("B", "D"), [(0, 8), (2, 0)])
def test_nothing(B, D):
    inputs = make(B=B, D=D)
    for name, gradient in backward(inputs, *outputs_gradients(inputs)).items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()


def test_without_a_bias_and_a_state():
    check(make() | {"bias": None, "initial_state": None})


def test_float32_weights_and_state():
    inputs = make()
    check(inputs | {"x": inputs["x"].to(BF16)})


def test_saturated():
    """The derivative of SiLU is 0 and 1 there."""
    inputs = make(T=20)
    inputs["x"] *= torch.logspace(0, 8, 20)[:, None]
    check(inputs)


def test_tiles_show_in_sums_only():
    inputs = make()
    given = outputs_gradients(inputs)
    found = backward(inputs, *given)
    for config in (SMALL._replace(length=8, ahead=4, stages=3), SMALL._replace(channels=8, ahead=4)):
        with cut(config):
            close(backward(inputs, *given), found)


def test_parts_are_added_in_several_steps(monkeypatch):
    inputs = make(B=3, T=20, W=2)
    given = outputs_gradients(inputs)
    found = backward(inputs, *given)
    monkeypatch.setattr(triton_bwd, "_REDUCED_ROWS", 4)
    monkeypatch.setattr(triton_bwd, "_REDUCED_COLUMNS", 32)
    close(backward(inputs, *given), found)


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "fresh"])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(with_state):
    """More of them than edge programs; some inside a tile, one over several, empty ones at both ends."""
    inputs, cu = packed([0, 5, 0, 1, 44, 3, 12, 0], W=3)
    inputs["x"][:, 50:53] = torch.nan
    dy, dfinal = outputs_gradients(inputs)
    given = inputs if with_state else inputs | {"initial_state": None}
    found = backward(given, dy, dfinal, cu)
    singles = [
        backward(one if with_state else one | {"initial_state": None}, dy[:, cu[n] : cu[n + 1]], dfinal[n : n + 1])
        for n, one in enumerate(alone(inputs, cu))
    ]
    assert torch.equal(found["x"].nan_to_num(7), torch.cat([one["x"] for one in singles], 1).nan_to_num(7))
    assert found["x"].isnan().any(2).sum() == 3
    if with_state:
        states = torch.cat([one["initial_state"] for one in singles])
        assert torch.equal(found["initial_state"].nan_to_num(7), states.nan_to_num(7))
        assert states.isnan().any(2).any(1).sum() == 1


def test_packed_sequences_by_the_reference():
    inputs, cu = packed([7, 0, 26, 1, 2, 3])
    check(inputs, cu_seqlens=cu)


def test_strided_views():
    inputs = make(B=2, T=20, W=2)
    dy, dfinal = outputs_gradients(inputs)
    expected = backward(inputs, dy, dfinal)
    x_view, dy_view = torch.cat([inputs["x"], dy], -1).split(16, -1)
    turned = dy.mT.contiguous().mT
    for views in ((x_view, dy_view), (inputs["x"], turned)):
        found = backward(inputs | {"x": views[0]}, views[1], dfinal.mT.contiguous().mT)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    found = backward(inputs, torch.ones([]).expand(2, 20, 16), dfinal)
    expected = backward(inputs, torch.ones(2, 20, 16), dfinal)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
