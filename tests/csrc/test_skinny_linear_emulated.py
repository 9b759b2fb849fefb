"""The kernel of products of few rows and its launcher, run on the CPU by an emulated driver; and what is refused."""

import pytest
import torch

from hylo_ops.cubin import native
from tests.csrc.emulator import build
from tests.csrc.emulator.run_skinny_linear import CPU, specs
from tests.csrc.skinny_linear_cases import BF16, EMULATED, WHOLE


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("test_skinny_linear_cuda.py")
    return build.run("run_skinny_linear", specs(), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", EMULATED, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]


def backend():
    return native().SkinnyLinear(torch, lambda *_: "any kernel", device_type=CPU)


def why_not(x, weight, residual=None, swiglu=False, norm=None, *conv):
    """Where any kernel can be had."""
    return backend().why_not(x, weight, residual, swiglu, norm, *conv)


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def shifted(tensor):
    """As many numbers two bytes behind a multiple of 16."""
    rows, columns = tensor.shape
    return zeros(rows, columns + 8)[:, 1 : columns + 1]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: case.name)
def test_whole_models_are_taken(case):
    outputs = case.N * (2 if case.swiglu else 1)
    residual = zeros(case.B, case.N) if case.residual else None
    conv = (zeros(case.channels, 4), zeros(case.B, case.channels, 4)) if case.channels else ()
    norm = zeros(case.K) if case.norm else None
    assert why_not(zeros(case.B, case.K), zeros(outputs, case.K), residual, case.swiglu, norm, *conv) == "any kernel"


def test_nothing_to_multiply():
    one = zeros(1, 128)
    assert why_not(one[:0], zeros(16, 128)) == "any kernel"
    assert why_not(one, zeros(16, 128)[:0]) == "any kernel"
    assert why_not(one, zeros(16, 256)[:, 128:]) == "any kernel"


X, W = zeros(3, 128), zeros(32, 128)
REFUSED = {
    "x of three dims": (X[None], W),
    "other columns": (X, zeros(32, 192)),
    "65 rows": (zeros(65, 128), W),
    "K of 96": (zeros(3, 96), zeros(32, 96), None, False, "K is 96, not a multiple of 64"),
    "no columns": (X[:, :0], W[:, :0], None, False, "K is 0, not a multiple of 64"),
    "N of 12": (X, W[:12], None, False, "N is 12, not a multiple of 8"),
    "halves of 4": (X, W[:8], None, True, "N is 4, not a multiple of 8"),
    "odd halves": (X, W[:31], None, True),
    "two dtypes": (X.half(), W),
    "fp32": (X.float(), W.float()),
    "a residual in fp32": (X, W, zeros(3, 32, dtype=torch.float32)),
    "a residual of other rows": (X, W, zeros(1, 32)),
    "a residual of gate and up": (X, W, zeros(3, 32), True),
    "a residual beside swiglu": (X, W, zeros(3, 16), True, "a residual is not added to what swiglu gives"),
    "a residual in wider rows": (X, W, zeros(3, 64)[:, :32]),
    "a residual that starts between": (X, W, shifted(zeros(1, 96)).view(3, 32)),
    "x as residual": (X, zeros(128, 128), X, False, "residual overlaps x or weight"),
    "a norm of other columns": (X, W, None, False, zeros(64)),
    "a norm in fp32": (X, W, None, False, torch.zeros(128)),
    "a norm that starts between": (X, W, None, False, zeros(129)[1:]),
    "a norm of every second number": (X, W, None, False, zeros(256)[::2]),
    "a norm of fp16": (X.half(), W.half(), None, False, zeros(128).half(), "a norm of float16 is not made on the way"),
    "weights as residual": (X, W, W.view(-1)[32:128].view(3, 32), False, "residual overlaps x or weight"),
    "x that starts between": (shifted(X), W),
    "weights that start between": (X, shifted(W)),
    "x in rows of 132": (zeros(3, 132)[:, :128], W),
    "weights in rows of 132": (X, zeros(32, 132)[:, :128]),
    "x transposed": (zeros(128, 3).mT, W),
    "weights transposed": (X, zeros(128, 32).mT),
    "one row for all of x": (X[:1].expand(3, 128), W),
    "one row for all weights": (X, W[:1].expand(32, 128)),
}


@pytest.mark.parametrize("inputs", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(inputs):
    *tensors, reason = inputs if isinstance(inputs[-1], str) else (*inputs, None)
    answer = why_not(*tensors)
    assert isinstance(answer, str)
    assert answer != "any kernel"
    assert reason is None or answer == reason


CONV, STATES = zeros(16, 4), zeros(3, 16, 4)
REFUSED_CONV = {
    "a residual": (zeros(3, 32), False, CONV, STATES, "what goes through a convolution is neither added to nor gated"),
    "swiglu": (None, True, CONV, STATES, "what goes through a convolution is neither added to nor gated"),
    "three taps": (None, False, CONV[:, 1:], STATES[..., 1:], "the convolution is over 3 tokens, not over 4"),
    "weights in wider rows": (None, False, zeros(16, 8)[:, :4], STATES),
    "states transposed": (None, False, CONV, zeros(3, 4, 16).mT),
    "states that start between": (None, False, CONV, zeros(3 * 16 * 4 + 1)[1:].view(3, 16, 4)),
    "states 2 bytes further apart": (None, False, CONV, zeros(3, 65)[:, :64].unflatten(1, (16, 4))),
    "fewer states": (None, False, CONV, STATES[:2]),
    "more channels than outputs": (None, False, zeros(40, 4), zeros(3, 40, 4)),
    "states in fp32": (None, False, CONV, STATES.float()),
}


@pytest.mark.parametrize("inputs", REFUSED_CONV.values(), ids=REFUSED_CONV.keys())
def test_a_convolution_that_is_refused(inputs):
    (residual, swiglu, *conv), reason = (inputs[:4], inputs[4]) if len(inputs) == 5 else (inputs, None)
    answer = why_not(X, W, residual, swiglu, None, *conv)
    assert isinstance(answer, str)
    assert answer != "any kernel"
    assert reason is None or answer == reason


@pytest.mark.parametrize("spread", [(0, 0, 0), (2, 0, 0), (9, 0, 0), (1, -1, 0), (1, 0, -1)])
def test_a_spread_that_cannot_be(spread):
    with pytest.raises(ValueError, match="spread must be 1 to 8 blocks"):
        backend().run(X, W, None, False, True, spread)
