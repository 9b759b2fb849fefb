"""The Triton backend of causal_conv1d on a GPU, against float64."""

import itertools

import pytest
import torch

from hylo_ops import causal_conv1d, recurrent_causal_conv1d
from hylo_ops.causal_conv1d import triton
from hylo_ops.testing import cast, gradients, within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMES = ("x", "weight", "bias", "initial_state")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IDS = ["bf16", "fp16", "fp32"]
BOUNDS = [0, 70, 70, 71, 300, 1900, 1902, 2005, 2005]


def make(B=2, T=333, D=2304, W=4, dtype=torch.bfloat16, N=None, seed=0):
    """The op's tensors by name; weights as a model starts with them."""
    rng = torch.Generator("cuda").manual_seed(seed)
    shapes = {"x": (B, T, D), "weight": (D, W), "bias": (D,), "initial_state": (N or B, D, W)}
    inputs = {name: torch.randn(shape, generator=rng, device="cuda") for name, shape in shapes.items()}
    inputs["weight"] /= W**0.5
    return cast(inputs, dtype)


def check(inputs, **options):
    options = {"activation": "silu"} | options
    y, state = causal_conv1d(**inputs, **options, backend="triton")
    y_eager, state_eager = causal_conv1d(**inputs, **options, backend="reference")
    y_exact, _ = causal_conv1d(**cast(inputs, torch.float64), **options, backend="reference")
    within_budget(y, y_eager, y_exact, "y")
    assert torch.equal(state, state_eager)


def check_gradients(inputs, **options):
    options = {"activation": "silu"} | options
    wanted = [name for name in NAMES if inputs[name] is not None]
    ours, again = (
        gradients(causal_conv1d, inputs | options | {"backend": "triton"}, wanted, torch.bfloat16) for _ in range(2)
    )
    eager = gradients(causal_conv1d, inputs | options | {"backend": "reference"}, wanted, torch.bfloat16)
    exact = gradients(
        causal_conv1d, cast(inputs, torch.float64) | options | {"backend": "reference"}, wanted, torch.bfloat16
    )
    for name in wanted:
        assert torch.equal(ours[name], again[name]), name
        within_budget(ours[name], eager[name], exact[name], name)


def backward(inputs, dy, dfinal, cu_seqlens=None):
    return triton.backward([dy, dfinal], *(inputs[name] for name in NAMES), cu_seqlens, "silu")


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("D", [40, 2304, 2305])
def test_both_ways(D, W, activation, dtype):
    inputs = make(D=D, W=W, dtype=dtype)
    check(inputs, activation=activation)
    check_gradients(inputs, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 7, 8, 64, 127, 128, 129, 260])
def test_lengths(T, dtype):
    inputs = make(T=T, D=256, dtype=dtype)
    check(inputs)
    check_gradients(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_long_sequences(dtype):
    """With walks as long as the tables have them."""
    inputs = make(B=1, T=16384, D=1024, dtype=dtype) | {"initial_state": None}
    check(inputs)
    check_gradients(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_float32_weights_and_state(dtype):
    inputs = make(dtype=torch.float32)
    inputs["x"] = inputs["x"].to(dtype)
    check(inputs)
    check_gradients(inputs)


def test_far_from_zero():
    inputs = make(dtype=torch.float32)
    inputs["x"] *= torch.logspace(0, 20, 333, device="cuda")[:, None]
    check(inputs)
    half = make(dtype=torch.float16)
    half["x"] *= 100
    check(half)
    check_gradients(half)


def test_without_a_bias_and_a_state():
    inputs = make() | {"bias": None, "initial_state": None}
    check(inputs)
    check_gradients(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("W", [2, 4])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(W, dtype):
    inputs = make(1, BOUNDS[-1], 512, W, dtype, len(BOUNDS) - 1)
    inputs["x"][:, 71:300] = torch.nan
    cu = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    y, final = causal_conv1d(**inputs, cu_seqlens=cu, activation="silu", backend="triton")
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    dx, _, _, dstate = backward(inputs, dy, dfinal, cu)
    for n, (begin, end) in enumerate(itertools.pairwise(BOUNDS)):
        one = inputs | {"x": inputs["x"][:, begin:end], "initial_state": inputs["initial_state"][n : n + 1]}
        y_one, final_one = causal_conv1d(**one, activation="silu", backend="triton")
        dx_one, _, _, dstate_one = backward(one, dy[:, begin:end], dfinal[n : n + 1])
        for found, expected in (
            (y[:, begin:end], y_one),
            (final[n : n + 1], final_one),
            (dx[:, begin:end], dx_one),
            (dstate[n : n + 1], dstate_one),
        ):
            assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
            assert n == 3 or torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_packed_sequences_by_the_reference(dtype):
    """More of them than edge programs, most shorter than a tile."""
    lengths = torch.randint(0, 40, [300], generator=torch.Generator().manual_seed(0))
    cu = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).cuda()
    inputs = make(1, int(cu[-1]), 256, dtype=dtype, N=300)
    check(inputs, cu_seqlens=cu)
    check_gradients(inputs, cu_seqlens=cu)


@pytest.mark.parametrize("cut", [1, 2, 150])
def test_two_parts_equal_the_whole(cut):
    inputs = make()
    options = {"activation": "silu", "backend": "triton"}
    y, final = causal_conv1d(**inputs, **options)
    first, state = causal_conv1d(**inputs | {"x": inputs["x"][:, :cut]}, **options)
    second, last = causal_conv1d(**inputs | {"x": inputs["x"][:, cut:], "initial_state": state}, **options)
    assert torch.equal(torch.cat([first, second], 1), y)
    assert torch.equal(last, final)


@pytest.mark.parametrize("first", [24, 23, 2])
def test_strided_views_are_read_in_place(first):
    """A slice of a projection whose width is a multiple of 8, not of 16; on 16 bytes, on 2 and on 4."""
    inputs = make(T=200)
    wide = torch.full((2, 200, 2304 + 24), torch.nan, dtype=torch.bfloat16, device="cuda")
    view = wide[..., first : first + 2304]
    view.copy_(inputs["x"])
    dy, dfinal = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    y, final = causal_conv1d(**inputs, activation="silu", backend="triton")
    found = causal_conv1d(**inputs | {"x": view}, activation="silu", backend="triton")
    assert torch.equal(found[0], y)
    assert torch.equal(found[1], final)
    for a, b in zip(backward(inputs | {"x": view}, dy, dfinal), backward(inputs, dy, dfinal), strict=True):
        assert torch.equal(a, b)


def test_offsets_past_32_bits():
    """The end of 2.4 billion elements, beside a call on the end alone."""
    T, last = 2**20 + 77, 1000
    inputs = make(1, T, 2304) | {"initial_state": None}
    state = inputs["x"][:, -last - 4 : -last].transpose(1, 2).contiguous()
    end = inputs | {"x": inputs["x"][:, -last:], "initial_state": state}
    y, final = causal_conv1d(**inputs, activation="silu", backend="triton")
    y_end, final_end = causal_conv1d(**end, activation="silu", backend="triton")
    assert torch.equal(y[:, -last:], y_end)
    assert torch.equal(final, final_end)
    dy, dfinal = y, torch.ones_like(final)
    dx = backward(inputs, dy, dfinal)[0]
    dx_end = backward(end, dy[:, -last:], dfinal)[0]
    assert torch.equal(dx[:, -last:], dx_end)


def test_all_that_is_allocated_is_written():
    """Fresh memory is full of NaN here."""
    inputs = make(3, 77, 300)
    torch.use_deterministic_algorithms(True)
    try:
        results = triton.forward(*(inputs[name] for name in NAMES), None, "silu")
        results += tuple(backward(inputs, torch.ones_like(results[0]), torch.ones_like(results[1])))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in results)


def test_a_graph_captures_it():
    inputs = make(B=1, T=256)
    y, final = causal_conv1d(**inputs, activation="silu")
    dx = backward(inputs, y, final)[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = causal_conv1d(**inputs, activation="silu")
        found_dx = backward(inputs, *found)[0]
    graph.replay()
    assert torch.equal(found[0], y)
    assert torch.equal(found_dx, dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32], ids=["state-bf16", "state-fp32"])
@pytest.mark.parametrize("W", [2, 3, 4])
def test_decode(W, state_dtype, dtype):
    inputs = make(3, 1, 2305, W, dtype)
    inputs["initial_state"] = inputs["initial_state"].to(state_dtype)
    x, weight, bias, state = inputs.values()
    # What the state rounds, y is to see.
    exact = [x.to(state_dtype).double(), weight.double(), bias.double(), state.double()]
    states = [state.clone(), state.clone()]
    y = recurrent_causal_conv1d(x, weight, bias, states[0], activation="silu", backend="triton")
    y_eager = recurrent_causal_conv1d(x, weight, bias, states[1], activation="silu", backend="reference")
    within_budget(y, y_eager, recurrent_causal_conv1d(*exact, activation="silu", backend="reference"), "y")
    assert torch.equal(*states)


@pytest.mark.parametrize("layout", ["rows", "channels last", "every other"])
def test_decode_from_a_pool_with_padding(layout):
    inputs = make(300, 1, 1000)
    x, weight, bias, states = inputs.values()
    pool = torch.full((600, 1000, 4), torch.nan, dtype=states.dtype, device="cuda")
    indices = torch.randperm(600, device="cuda")[:300]
    pool[indices] = states
    if layout == "channels last":
        pool = pool.mT.contiguous().mT
    elif layout == "every other":
        pool = torch.stack([pool] * 2, 1)[:, 0]
    padded = torch.where(torch.arange(300, device="cuda") % 3 == 0, -1, indices).to(torch.int32)
    used = padded >= 0
    y = recurrent_causal_conv1d(x, weight, bias, pool, state_indices=padded, activation="silu", backend="triton")
    alone = states.clone()
    expected = recurrent_causal_conv1d(x, weight, bias, alone, activation="silu", backend="triton")
    assert torch.equal(y, expected * used[:, None, None])
    assert torch.equal(pool[indices[used]], alone[used])
    assert torch.equal(pool[indices[~used]], states[~used])
    assert pool.isnan().all(2).all(1).sum() == 300


def test_the_default_is_triton():
    inputs = make()
    y, _ = causal_conv1d(**inputs, activation="silu")
    assert torch.equal(y, causal_conv1d(**inputs, activation="silu", backend="triton")[0])
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        for D, W in itertools.product((1, 2304, 6144), (2, 3, 4)):
            x = torch.empty(1, 5, D, dtype=dtype, device="cuda")
            weight = torch.empty(D, W, dtype=weight_dtype, device="cuda")
            assert triton.why_not(x, weight) is None
