"""The chunked forward of ssd in Triton against the recurrence in float64."""

import itertools

import pytest
import torch

from hylo_ops import chunk_ssd
from hylo_ops.ssd import triton_chunk_fwd
from hylo_ops.ssd.triton_chunk_fwd import tiles_for
from hylo_ops.testing import within_budget
from tests.triton.ssd_cases import (
    DTYPES,
    SMALL,
    TOKENWISE,
    WIDE,
    exact,
    hostile_steps,
    make,
    steps,
    tiled,
)


@pytest.fixture(autouse=True)
def small_tiles():
    with tiled(SMALL):
        yield


def forward(inputs, dt_softplus=True, **options):
    return chunk_ssd(**inputs, dt_softplus=dt_softplus, backend="triton", **options)


def check(inputs, **options):
    """Both results within the error budget; the state as its products see it, in the dtype of the inputs."""
    dtype, found = inputs["x"].dtype, forward(inputs, **options)
    expected = zip(("o", "state"), found, steps(inputs, **options), exact(inputs, **options), strict=True)
    for name, ours, eager, truth in expected:
        assert ours.dtype == eager.dtype
        within_budget(ours.to(dtype), eager.to(dtype), truth, name)


@pytest.mark.parametrize(("T", "state"), [(1, True), (16, False), (17, True), (32, False), (33, False), (70, True)])
def test_lengths(T, state):
    check(make(B=1, T=T, state=state))


@pytest.mark.parametrize(("V", "K"), [(16, 48), (48, 16), (64, 64), (16, 192), (144, 16)])
def test_widths(V, K):
    check(make(B=1, T=20, H=1, heads=(1, 1, 1), V=V, K=K))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_the_tables(dtype):
    with tiled(tiles_for(48, 80, dtype)):
        check(make(B=1, T=131, H=1, heads=(1, 1, 1), V=48, K=80, dtype=dtype))


def test_chunks_of_four_blocks_and_many_tiles():
    with tiled(SMALL._replace(chunk=64, o=WIDE._replace(rows=16, columns=16))):
        check(make(B=1, T=70, H=1, heads=(1, 1, 1), V=32, K=48))


@pytest.mark.parametrize("heads", [(6, 1, 1), (2, 2, 6), (2, 3, 1)], ids=str)
def test_shared_heads(heads):
    check(make(B=1, T=12, H=6, heads=heads))


@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.1, 1.5)), (False, None), (False, (0.0, torch.inf))])
def test_steps(softplus, limit):
    inputs = make(B=1, T=20)
    if not softplus:
        inputs |= {name: inputs[name].abs() for name in ("dt", "dt_bias")}
    check(inputs, dt_softplus=softplus, dt_limit=limit)


def test_options_left_out():
    inputs = make(B=1, T=20)
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("d", "dt_bias")}
    bare = {name: value for name, value in inputs.items() if name not in zeros}
    assert all(torch.equal(*pair) for pair in zip(forward(bare), forward(inputs | zeros), strict=True))


@pytest.mark.parametrize("gate_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gates_in_other_dtypes(gate_dtype):
    inputs = make(B=1, T=20)
    names = ("dt", "a", "d", "dt_bias")
    rounded = inputs | {name: inputs[name].to(gate_dtype) for name in names}
    same = rounded | {name: rounded[name].float() for name in names}
    assert all(torch.equal(*pair) for pair in zip(forward(rounded), forward(same), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_steps(dtype):
    check(hostile_steps(make(B=1, T=40, H=3, heads=(1, 1, 1), dtype=dtype)))


def test_strong_gates_down_to_400_a_chunk():
    inputs = make(B=1, T=64)
    inputs["a"][:] = torch.tensor([-12.5, -25.0])
    inputs["dt"][:] = 1
    inputs["dt_bias"][:] = 0
    check(inputs, dt_softplus=False)


@pytest.mark.parametrize("bounds", [[0, 34, 34, 35, 51], [0, 0, 5], [0, 0]], ids=str)
def test_packed_sequences_equal_single_ones(bounds):
    N = len(bounds) - 1
    inputs = make(B=1, T=bounds[-1], H=1, heads=(1, 1, 1), V=48)
    states = make(B=N, T=1, H=1, V=48)["initial_state"]
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, final = forward(inputs | {"initial_state": states}, cu_seqlens=cu, fixed_split=True)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = inputs | {name: inputs[name][:, begin:end] for name in TOKENWISE}
        o_n, final_n = forward(alone | {"initial_state": states[n : n + 1]}, fixed_split=True)
        assert torch.equal(o[:, begin:end], o_n)
        assert torch.equal(final[n : n + 1], final_n)
        if begin == end:
            assert torch.equal(final[n], states[n])


def test_a_neighbours_nan_stays_where_it_is():
    inputs = make(B=1, T=40, state=False)
    for name in TOKENWISE:
        inputs[name][:, 18:] = torch.nan
    o, final = forward(inputs, cu_seqlens=torch.tensor([0, 18, 40, 40], dtype=torch.int32))
    alone = forward(inputs | {name: inputs[name][:, :18] for name in TOKENWISE})
    assert torch.equal(o[:, :18], alone[0])
    assert torch.equal(final[:1], alone[1])
    assert not final[2].any()


def test_no_tokens():
    inputs = make(T=0)
    o, final = forward(inputs)
    assert o.shape == (2, 0, 2, 16)
    assert torch.equal(final, inputs["initial_state"])


def test_slices_of_one_projection():
    """Read in place where tokens are evenly spaced, and copied where they are not."""
    inputs = make(T=20, heads=(1, 2, 2))
    whole = torch.cat([torch.ones(2, 25, 1), torch.randn(2, 25, 2 + 5 * 16)], -1)
    for projection, begin in ((whole[:, :20].contiguous(), 1), (whole[:, 5:], 0)):
        dt, x, b, c = projection[:, :, begin : begin + 82].split([2, 16, 32, 32], -1)
        views = {"x": x.unflatten(-1, (1, 16)), "b": b.unflatten(-1, (2, 16)), "c": c.unflatten(-1, (2, 16)), "dt": dt}
        for name, value in views.items():
            assert value.stride(1) == 83, name
        same = {name: value.contiguous() for name, value in views.items()}
        found, expected = forward(inputs | views), forward(inputs | same)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        in_place = triton_chunk_fwd.evenly_spaced(views["x"]) is views["x"]
        assert in_place == (begin == 1)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"K": 24}, "K is 24, not a multiple of 16 up to 256"),
        ({"K": 272}, "K is 272, not a multiple of 16 up to 256"),
        ({"V": 20}, "V is 20, not a multiple of 16"),
        ({"dtype": torch.float64}, "x is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_cannot_run(sizes, reason):
    inputs = make(T=3, **sizes)
    with pytest.raises(NotImplementedError, match=reason):
        forward(inputs)
    assert chunk_ssd(**inputs)[0].isfinite().all()  # the reference does
