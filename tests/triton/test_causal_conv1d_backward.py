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
    ours = gradients(causal_conv1d, inputs | options | {"backend": "triton"}, wanted)
    eager = gradients(causal_conv1d, inputs | options | {"backend": "reference"}, wanted)
    exact = gradients(causal_conv1d, cast(inputs, torch.float64) | options | {"backend": "reference"}, wanted)
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


@pytest.mark.parametrize("T", [0, 1, 4, 7, 8, 40])
def test_lengths(T):
    """Around the width, where head and tail meet, and around a tile."""
    check(make(B=2, T=T))


@pytest.mark.parametrize("D", [1, 33])
def test_channels(D):
    check(make(T=36, D=D, W=2))


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
    inputs = make(T=36)
    inputs["x"] *= torch.logspace(0, 8, 36)[:, None]
    check(inputs)


def test_tiles_show_in_sums_only():
    inputs = make()
    gradients_of_outputs = outputs_gradients(inputs)
    found = backward(inputs, *gradients_of_outputs)
    for config in (SMALL._replace(length=16, stages=3), SMALL._replace(channels=8, ahead=8)):
        with cut(config):
            again = backward(inputs, *gradients_of_outputs)
        for name in ("x", "initial_state"):
            assert torch.equal(again[name], found[name])
        for name in ("weight", "bias"):
            torch.testing.assert_close(again[name], found[name], rtol=1e-5, atol=1e-5)


def test_many_parts(monkeypatch):
    """The reduction goes over its rows in steps, and over channels in several programs."""
    monkeypatch.setattr(triton_bwd, "_REDUCED_ROWS", 4)
    monkeypatch.setattr(triton_bwd, "_REDUCED_COLUMNS", 32)
    with cut(SMALL._replace(length=4)):
        check(make(B=3, T=36, W=2))


@pytest.mark.parametrize("with_state", [True, False], ids=["state", "fresh"])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(with_state):
    """More of them than edge programs; some inside a tile, one over several, empty ones at both ends."""
    inputs, cu = packed([0, 5, 0, 1, 70, 3, 12, 0], W=3)
    inputs["x"][:, 76:79] = torch.nan
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
    inputs, cu = packed([7, 0, 36, 1, 2, 3])
    check(inputs, cu_seqlens=cu)


def test_strided_views():
    inputs = make(B=2, T=36, W=2)
    dy, dfinal = outputs_gradients(inputs)
    expected = backward(inputs, dy, dfinal)
    x_view, dy_view = torch.cat([inputs["x"], dy], -1).split(16, -1)
    turned = dy.mT.contiguous().mT
    for views in ((x_view, dy_view), (inputs["x"], turned)):
        found = backward(inputs | {"x": views[0]}, views[1], dfinal.mT.contiguous().mT)
        assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    found = backward(inputs, torch.ones([]).expand(2, 36, 16), dfinal)
    expected = backward(inputs, torch.ones(2, 36, 16), dfinal)
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


def test_registration():
    inputs = make(T=3, D=3, W=2)
    arguments = ([*outputs_gradients(inputs)], *inputs.values(), None, "silu", "triton")
    torch.library.opcheck(torch.ops.hylo_ops.causal_conv1d_backward, arguments)
