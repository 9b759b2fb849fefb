"""fused.linear_step: a norm, a product, SwiGLU or a convolution one after the other, registration, rejected inputs."""

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import recurrent_causal_conv1d
from hylo_ops.fused import linear_step
from hylo_ops.testing import cast, within_budget

EPS = 1e-5
FORMS = ["plain", "norm", "conv", "norm conv", "swiglu", "norm swiglu"]


def make(form="norm conv", B=3, K=48, N=40, D=24, W=4, dtype=torch.float64, device="cpu"):
    """The op's arguments."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    x = {"x": normal(B, 1, K), "weight": normal(2 * N if "swiglu" in form else N, K) * K**-0.5}
    x |= {"eps": EPS, "swiglu": "swiglu" in form}
    if "norm" in form:
        x["norm_weight"] = normal(K)
    if "conv" in form:
        x |= {"conv_weight": normal(D, W), "conv_state": normal(B, D, W), "activation": "silu"}
    return x


def ours(x, **options):
    """y, and the state after it."""
    state = x["conv_state"].clone() if "conv_state" in x else None
    return [linear_step(**{**x, **options, "conv_state": state}), *([] if state is None else [state])]


def one_by_one(x):
    """The same in eager PyTorch."""
    inputs, y = x["x"], x["x"]
    if "norm_weight" in x:
        inputs = F.rms_norm(inputs, x["norm_weight"].shape, x["norm_weight"], x["eps"])
    y = F.linear(inputs, x["weight"])
    if x["swiglu"]:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    if "conv_weight" not in x:
        return [y]
    state, D = x["conv_state"].clone(), len(x["conv_weight"])
    options = {"activation": x["activation"], "backend": "reference"}
    mixed = recurrent_causal_conv1d(y[..., :D], x["conv_weight"], None, state, **options)
    return [torch.cat([mixed, y[..., D:]], dim=-1), state]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [{}, {"W": 2}, {"W": 3, "B": 1}, {"D": 40}, {"B": 64, "D": 1}], ids=str)
def test_equals_the_ops(sizes, form):
    x = make(form, **sizes)
    for got, want in zip(ours(x), one_by_one(x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_a_convolution_without_activation():
    x = make() | {"activation": None}
    for got, want in zip(ours(x), one_by_one(x), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(dtype, form):
    x = make(form, K=333, dtype=dtype)
    for got, theirs, want in zip(ours(x), one_by_one(x), one_by_one(cast(x, torch.float64)), strict=True):
        assert got.dtype == dtype
        within_budget(got, theirs, want)


def test_several_tokens_one_after_the_other():
    """The states that one call leaves are what the next one begins with."""
    x = make("conv")
    state, tokens = x["conv_state"].clone(), torch.randn(6, *x["x"].shape, dtype=torch.float64)
    conv = {"conv_weight": x["conv_weight"], "conv_state": state}
    found = [linear_step(token, x["weight"], **conv) for token in tokens]
    inputs = torch.cat([F.linear(token, x["weight"])[..., :24] for token in tokens], dim=1)
    window = torch.cat([x["conv_state"], inputs.mT], dim=-1)
    for t, y in enumerate(found):
        want = (window[..., t + 1 : t + 5] * x["conv_weight"]).sum(-1)
        torch.testing.assert_close(y[:, 0, :24], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, window[..., -4:], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_registration(form):
    x = make(form, dtype=torch.float32)
    names = ["x", "weight", "norm_weight", "eps", "swiglu", "conv_weight", "conv_state", "activation"]
    arguments = (*map(x.get, names), False, "reference")
    torch.library.opcheck(torch.ops.hylo_ops.linear_step.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2, 48)}, r"x must have shape \[B, 1, K\], got \[3, 2, 48\]"),
        ({"x": torch.zeros(65, 1, 48)}, r"x must have 1 to 64 sequences, got 65 in \[65, 1, 48\]"),
        ({"weight": torch.zeros(40, 47)}, r"weight must have shape \[N, 48\], got \[40, 47\]"),
        ({"weight": torch.zeros(40, 48).half()}, "weight must be float32, got float16"),
        ({"norm_weight": torch.zeros(47)}, r"norm_weight must have shape \[48\], got \[47\]"),
        ({"norm_weight": torch.zeros(48).int()}, "norm_weight must be bfloat16 or .*, got int32"),
        ({"conv_weight": torch.zeros(24, 5)}, r"the width of conv_weight must be one of \[2, 3, 4\], got 5"),
        ({"conv_weight": torch.zeros(41, 4)}, "at most as many channels as weight has rows, 40, got 41"),
        ({"conv_weight": None}, "conv_weight and conv_state must come together, got one of them"),
        ({"conv_state": torch.zeros(2, 24, 4)}, r"conv_state must have shape \[3, 24, 4\], got \[2, 24, 4\]"),
        ({"swiglu": True}, "swiglu and conv_weight must not come together, got both"),
        ({"activation": "relu"}, r"activation must be one of \[None, 'silu'\], got 'relu'"),
        ({"weight": torch.zeros(40, 48, requires_grad=True)}, "weight must not require a gradient"),
    ],
)
def test_inputs_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        linear_step(**(make(dtype=torch.float32) | change))


def test_odd_halves():
    with pytest.raises(ValueError, match=r"weight must have shape \[2 N, K\] with swiglu, got \[3, 48\]"):
        linear_step(torch.zeros(2, 1, 48), torch.zeros(3, 48), swiglu=True)


@pytest.mark.parametrize("backend", ["cuda", "composed"])
def test_a_named_backend_says_why_not(backend):
    with pytest.raises(NotImplementedError, match="not on a CUDA device"):
        linear_step(**make(dtype=torch.bfloat16), backend=backend)
