"""The gradients of the chunked scan of ssd in Triton against those of the reference in float64."""

import itertools

import pytest
import torch

from hylo_ops import chunk_ssd
from hylo_ops.ssd import triton_chunk_bwd
from hylo_ops.ssd.triton_chunk_fwd import tiles_for
from hylo_ops.testing import cast, gradients, relative_error
from tests.triton.ssd_cases import NAMES, SMALL, TOKENWISE, WIDE, hostile_steps, make, tiled

ALL = (*NAMES, "initial_state")
VECTORS = ("a", "d", "dt_bias")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def small_tiles():
    with tiled(SMALL):
        yield


def backward(inputs, do, d_final_state, cu_seqlens=None, dt_softplus=True, dt_limit=None, backend="triton"):
    """The bare op, with gradients of the outputs as they are given."""
    arguments = [inputs[name] for name in ALL]
    given = [name for name in ALL if inputs[name] is not None]
    options = cu_seqlens, dt_softplus, dt_limit, True, False, backend
    saved = torch.empty(0)  # no states
    found = torch.ops.hylo_ops.chunk_ssd_backward([do, d_final_state], [saved], *arguments, *options)
    return dict(zip(given, found, strict=True))


def found(inputs, backend="triton", exactly=False, **options):
    """Gradients of a fixed random projection of o and the final state; `exactly` in float64."""
    (B, T, H), V, K = inputs["dt"].shape, inputs["x"].shape[3], inputs["b"].shape[3]
    rng = torch.Generator().manual_seed(7)
    do = torch.randn(B, T, H, V, generator=rng).to(inputs["x"].dtype)
    d_final = torch.randn(B, H, V, K, generator=rng)
    if exactly:
        inputs, do, d_final, backend = cast(inputs, torch.float64), do.double(), d_final.double(), "reference"
    return backward(inputs, do, d_final, backend=backend, **options)


def check(inputs, **options):
    """Every gradient at most twice as far from float64 as eager PyTorch or as a unit in the last place.

    Those of a, d and dt_bias are a few sums over all tokens in which much cancels: see the test of many heads.
    """
    ours, eager = found(inputs, **options), found(inputs, "reference", **options)
    exact = found(inputs, exactly=True, **options)
    for name, truth in exact.items():
        assert ours[name].dtype == inputs[name].dtype
        assert ours[name].shape == inputs[name].shape
        limit = 1e-4 if name in VECTORS else 2 * max(relative_error(eager[name], truth), EPS)
        assert relative_error(ours[name], truth) <= limit, name
    return ours


@pytest.mark.parametrize(("T", "state"), [(1, True), (16, False), (17, True), (32, False), (33, True), (70, False)])
def test_lengths(T, state):
    check(make(B=1, T=T, state=state))


@pytest.mark.parametrize(("V", "K"), [(16, 48), (48, 16), (80, 16), (16, 144)])
def test_widths(V, K):
    check(make(B=1, T=20, H=1, heads=(1, 1, 1), V=V, K=K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_the_tables(dtype):
    inputs = make(B=1, T=131, H=1, heads=(1, 1, 1), V=32, K=48, dtype=dtype)
    with tiled(tiles_for(32, 48, dtype)):
        right_to_a_unit(inputs)


def test_chunks_of_four_blocks_and_many_tiles():
    narrow = WIDE._replace(rows=16, columns=16)
    with tiled(SMALL._replace(chunk=64, dx=narrow, db=narrow, dc=narrow)):
        check(make(B=1, T=70, H=1, heads=(1, 1, 1), V=32, K=32))


@pytest.mark.parametrize("heads", [(6, 1, 1), (2, 2, 6), (2, 3, 1)], ids=str)
def test_shared_heads(heads):
    check(make(B=1, T=12, H=6, heads=heads))


def test_heads_in_parts(monkeypatch):
    monkeypatch.setattr(triton_chunk_bwd, "_MOST_HEADS", 3)
    check(make(B=1, T=12, H=6, heads=(6, 1, 2)))


def test_vectors_of_many_heads():
    """Taken together, so that no head in which all cancels decides."""
    inputs = make(B=1, T=18, H=12, heads=(1, 1, 1))
    ours, exact = found(inputs), found(inputs, exactly=True)
    for name in VECTORS:
        assert relative_error(ours[name], exact[name]) < 8 * EPS, name


def right_to_a_unit(inputs):
    """In the last place of the inputs' dtype: with 16 bits accuracy is for the GPU to show."""
    ours, exact = found(inputs), found(inputs, exactly=True)
    for name, truth in exact.items():
        assert ours[name].dtype == inputs[name].dtype
        limit = max(2 * torch.finfo(inputs["x"].dtype).eps, 1e-4 if name in VECTORS else 0)
        assert relative_error(ours[name], truth) < limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    right_to_a_unit(make(B=1, T=40, heads=(1, 1, 2), V=48, K=32, dtype=dtype))


@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.4, 1.5)), (False, None), (False, (0.3, torch.inf))])
def test_steps(softplus, limit):
    inputs = make(B=1, T=20)
    if not softplus:
        inputs |= {name: inputs[name].abs() for name in ("dt", "dt_bias")}
    ours = check(inputs, dt_softplus=softplus, dt_limit=limit)
    if limit:
        assert not ours["dt"].all()  # of steps beyond a limit


def test_a_step_at_its_limit_has_a_gradient():
    inputs = make(B=1, T=3)
    inputs["dt"][:], inputs["dt_bias"][:] = 0.5, 0
    assert check(inputs, dt_softplus=False, dt_limit=(0.5, 0.5))["dt"].all()


def test_options_left_out():
    inputs = make(B=1, T=20, state=False)
    check(inputs | {"d": None, "dt_bias": None})


def test_gates_in_other_dtypes():
    inputs = make(B=1, T=20)
    inputs |= {name: inputs[name].half() for name in ("dt", "a", "d", "dt_bias")}
    ours, exact = found(inputs), found(inputs, exactly=True)
    for name, truth in exact.items():
        assert ours[name].dtype == inputs[name].dtype
        assert relative_error(ours[name], truth) < torch.finfo(torch.float16).eps, name


def test_hostile_steps():
    ours = check(hostile_steps(make(B=1, T=40, H=3, heads=(1, 1, 1))))
    assert all(gradient.isfinite().all() for gradient in ours.values())


def test_a_closed_gate_has_no_gradient():
    """What stands before a decay of exp(-110) is forgotten, nothing moves with it: cancelling sums would leave noise.

    Gates at a block's edges and within, of which the step has no other gradient: its token writes nothing.
    """
    inputs = make(B=1, T=70)
    closed = [15, 16, 20, 31, 32, 69]
    inputs["a"][:] = -220
    inputs["dt"] *= 1e-4
    inputs["dt"][:, closed] = 0.5
    inputs["x"][:, closed] = 0
    inputs["d"] = inputs["dt_bias"] = None
    ours = found(inputs, dt_softplus=False)["dt"]
    assert not ours[:, closed].any()
    assert ours[:, [14, 17, 19, 21, 30, 33, 68]].abs().min() > 1e-3


def test_packed_sequences_equal_single_ones():
    bounds = [0, 0, 18, 22, 22]
    inputs = make(B=1, T=bounds[-1], H=1, heads=(1, 1, 1))
    inputs["initial_state"], d_final = (make(B=4, T=1, H=1, seed=seed)["initial_state"] for seed in (1, 2))
    do = torch.randn(1, bounds[-1], 1, 16)
    packed = backward(inputs, do, d_final, torch.tensor(bounds, dtype=torch.int32))
    sums = dict.fromkeys(VECTORS, 0)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = inputs | {name: inputs[name][:, begin:end] for name in TOKENWISE}
        part["initial_state"] = inputs["initial_state"][n : n + 1]
        alone = backward(part, do[:, begin:end], d_final[n : n + 1])
        assert all(torch.equal(packed[name][:, begin:end], alone[name]) for name in TOKENWISE)
        assert torch.equal(packed["initial_state"][n : n + 1], alone["initial_state"])
        sums = {name: total + alone[name] for name, total in sums.items()}
        if begin == end:
            assert torch.equal(packed["initial_state"][n], d_final[n])
    for name, total in sums.items():
        torch.testing.assert_close(packed[name], total, rtol=1e-5, atol=1e-5)


def test_a_neighbours_nan_stays_where_it_is():
    inputs = make(B=1, T=40, state=False)
    do, d_final = torch.randn(1, 40, 2, 16), torch.randn(2, 2, 16, 16)
    for value in (do, *(inputs[name] for name in TOKENWISE)):
        value[:, 18:] = torch.nan
    d_final[1] = torch.nan
    ours = backward(inputs, do, d_final, torch.tensor([0, 18, 40], dtype=torch.int32))
    for name in TOKENWISE:
        assert ours[name][:, :18].isfinite().all()
        assert ours[name][:, 18:].isnan().any()


def test_same_bits_twice_and_in_any_batch():
    inputs = make(T=18, H=1, heads=(1, 1, 1))
    do, d_final = torch.randn(2, 18, 1, 16), torch.randn(inputs["initial_state"].shape)
    first, second = (backward(inputs, do, d_final) for _ in range(2))
    one = inputs | {name: inputs[name][1:2] for name in (*TOKENWISE, "initial_state")}
    alone = backward(one, do[1:2], d_final[1:2])
    for name in ALL:
        assert torch.equal(first[name], second[name])
        assert name in VECTORS or torch.equal(first[name][1:2], alone[name])


def test_strided_views_and_expanded_gradients():
    inputs = make(T=12, H=1, heads=(1, 1, 1))
    wide = inputs | {name: torch.stack([inputs[name]] * 2, -1)[..., 0] for name in (*NAMES, "initial_state")}
    expanded = torch.ones(1).expand(2, 12, 1, 16), torch.zeros(1).expand(inputs["initial_state"].shape)
    ours, same = backward(wide, *expanded), backward(inputs, *(x.contiguous() for x in expanded))
    assert all(torch.equal(ours[name], same[name]) for name in ALL)


def test_no_tokens():
    inputs = make(T=0)
    d_final = torch.randn(inputs["initial_state"].shape)
    ours = backward(inputs, torch.empty(2, 0, 2, 16), d_final)
    assert all(ours[name].shape == inputs[name].shape for name in ALL)
    assert not any(ours[name].any() for name in VECTORS)
    assert torch.equal(ours["initial_state"], d_final)


def test_through_the_public_function():
    inputs = make(B=1, T=12)
    exact = gradients(chunk_ssd, cast(inputs, torch.float64) | {"dt_softplus": True}, ALL)
    ours = gradients(chunk_ssd, inputs | {"dt_softplus": True, "backend": "triton"}, ALL)
    assert all(relative_error(ours[name], exact[name]) < 1e-4 for name in ALL)
