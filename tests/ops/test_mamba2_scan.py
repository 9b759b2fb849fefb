"""fused.mamba2_scan: equals the block's definition, gradients, packed sequences, split state, decode after it."""

import pytest
import torch

from hylo_ops.fused import mamba2_scan, mamba2_step
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.mamba2_cases import KINDS, LIMIT, make, plain

DTYPE = torch.float64
STATES = ("conv_state", "initial_state")
TENSORS = (
    "z",
    "xbc",
    "dt",
    "conv_weight",
    "conv_bias",
    "a",
    "norm_weight",
    "d",
    "dt_bias",
    "conv_state",
    "initial_state",
)


def close(got, wanted, atol=1e-10):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"norm_before_gate": True}, {"dt_limit": LIMIT}])
def test_equals_the_definition(kind, options):
    x = make(kind, 67)
    close(mamba2_scan(**x, **options), plain(**x, **options))


def test_options_left_out():
    x = make("hylo", 9)
    zeros = {name: torch.zeros_like(x[name]) for name in ("conv_bias", "d", "dt_bias", *STATES)}
    bare = {name: t for name, t in x.items() if name not in zeros} | {"conv_bias": None}
    close(mamba2_scan(**bare), plain(**x | zeros))


@pytest.mark.parametrize("kind", ["hylo", "mamba2"])
def test_gradients(kind):
    x = make(kind, 67)
    got, wanted = (gradients(function, x, TENSORS) for function in (mamba2_scan, plain))
    for name in TENSORS:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_packed_sequences_equal_single_ones():
    lengths, x = [5, 0, 1, 70], make("hylo", 76, N=4)
    x |= {name: x[name][:1] for name in ("z", "xbc", "dt")}
    bounds = torch.tensor([0, 5, 5, 6, 76], dtype=torch.int32)
    y, conv_state, state = mamba2_scan(**x, cu_seqlens=bounds)
    for n, length in enumerate(lengths):
        span = slice(bounds[n], bounds[n] + length)
        one = (
            x | {name: x[name][:, span] for name in ("z", "xbc", "dt")} | {name: x[name][n : n + 1] for name in STATES}
        )
        close((y[:, span], conv_state[n : n + 1], state[n : n + 1]), mamba2_scan(**one))


def test_two_halves_and_a_step_are_the_whole():
    x = make("hylo", 70)
    y, conv_state, state = mamba2_scan(**x)
    parts = []
    for span in (slice(0, 33), slice(33, 69)):
        part, x["conv_state"], x["initial_state"] = mamba2_scan(
            **x | {name: x[name][:, span] for name in ("z", "xbc", "dt")}
        )
        parts.append(part)
    last = x | {name: x[name][:, 69:] for name in ("z", "xbc", "dt")} | {"state": x["initial_state"]}
    del last["initial_state"]
    parts.append(mamba2_step(**last))
    close((torch.cat(parts, 1), last["conv_state"], last["state"]), (y, conv_state, state))


def test_views_of_one_projection():
    """As a model has them; nothing is copied to be cut into heads. A CPU may round an unaligned row's end otherwise."""
    x = make("hylo", 9)
    z, xbc, dt = (x[name] for name in ("z", "xbc", "dt"))
    projected = torch.cat([z.flatten(2), xbc, dt], dim=-1)
    views = projected.split([z[0, 0].numel(), xbc.shape[2], dt.shape[2]], dim=-1)
    strided = x | {"z": views[0].unflatten(-1, z.shape[2:]), "xbc": views[1], "dt": views[2]}
    close(mamba2_scan(**strided), mamba2_scan(**x), atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_budget(dtype):
    """Against the definition in the same dtype."""
    x = make("mamba2", 40, dtype=dtype)
    results = mamba2_scan(**x), plain(**x), mamba2_scan(**cast(x, DTYPE))
    for name, ours, eager, exact in zip(("y", "conv_state", "state"), *results, strict=True):
        within_budget(ours, eager, exact, name)
    assert [r.dtype for r in results[0]] == [dtype, dtype, torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xbc": torch.zeros(2, 3, 29)}, r"conv_weight must have shape \[29, W\], got \[30, 4\]"),
        (
            {"initial_state": torch.zeros(1, 4, 6, 3)},
            r"initial_state must have shape \[2, 4, 6, 3\], got \[1, 4, 6, 3\]",
        ),
        ({"conv_state": torch.zeros(2, 29, 4)}, r"conv_state must have shape \[2, 30, 4\], got \[2, 29, 4\]"),
        ({"d_state": 0}, "xbc must have x_heads V"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        mamba2_scan(**(make("hylo", 3, dtype=torch.float32) | change))


def test_a_named_backend_is_asked_of_each_op():
    with pytest.raises(NotImplementedError, match=r"convolved_ssd .*no_such"):
        mamba2_scan(**make("hylo", 3), backend="no_such")


def test_registration():
    x = make("mamba2", 5, dtype=torch.float32)
    names = "xbc", "conv_weight", "conv_bias", "dt", "a", "d", "dt_bias", "conv_state", "initial_state"
    leaves = [x[name].requires_grad_() for name in names]
    options = None, x["z"].shape[3], x["d_state"], x["x_heads"], x["b_heads"], True, None, True, None
    torch.library.opcheck(torch.ops.hylo_ops.convolved_ssd, (*leaves, *options))


def test_compiles_without_a_graph_break():
    x = make("mamba2", 40, dtype=torch.float32)
    leaf = x["xbc"].requires_grad_()
    found = []
    for function in (mamba2_scan, torch.compile(mamba2_scan, fullgraph=True, backend="aot_eager")):
        y, conv_state, state = function(**x)
        found.append((y, conv_state, state, *torch.autograd.grad(y.square().sum() + state.sum(), leaf)))
    close(*found, atol=1e-5)
