"""The chunked forward of gated_delta_rule in Triton against the recurrence in float64."""

import itertools

import pytest
import torch

from hylo_ops import chunk_gated_delta_rule
from hylo_ops.common.chunk_table import chunk_table
from hylo_ops.gated_delta_rule import triton_chunk_fwd
from hylo_ops.testing import within_budget
from tests.triton.gated_delta_rule_cases import DTYPES, NAMES, exact, hostile_gates, make, steps

SCALE = 0.3


def check(found, inputs):
    """Both results within the error budget; the state as its products see it, in the dtype of the inputs."""
    dtype = inputs["q"].dtype
    for name, ours, eager, truth in zip(("o", "state"), found, steps(inputs, SCALE), exact(inputs, SCALE), strict=True):
        assert ours.dtype == eager.dtype
        within_budget(ours.to(dtype), eager.to(dtype), truth, name)


def forward(inputs, **options):
    return chunk_gated_delta_rule(**inputs, scale=SCALE, backend="triton", **options)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_lengths(T, state):
    inputs = make(T=T, G=2, H=4, state=state)
    check(forward(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("K", "V"), [(16, 48), (48, 16), (64, 64), (64, 128), (128, 64), (192, 16), (256, 32)], ids=lambda size: str(size)
)
def test_widths_and_dtypes(dtype, K, V):
    inputs = make(T=65, K=K, V=V, dtype=dtype)
    check(forward(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_in_float32(dtype):
    inputs = make(T=65, dtype=dtype)
    inputs |= {name: inputs[name].float() for name in ("g", "beta")}
    check(forward(inputs), inputs)


def test_hostile_gates():
    inputs = hostile_gates(make(T=131))
    check(forward(inputs), inputs)


def test_repeated_keys():
    """The inverse for a run of equal keys is bounded, but not the powers of L: those of 16 rows pass 10^5."""
    inputs = make(T=64, K=64)
    inputs["k"][:] = inputs["k"][:, :1]
    inputs["beta"][:] = 1.5
    inputs["g"][:] = 0
    check(forward(inputs), inputs)


@pytest.mark.parametrize("bounds", [[0, 70, 70, 71, 135], [0, 0, 64, 128], [0, 5, 5], [0, 0]], ids=str)
def test_packed_sequences_equal_single_ones(bounds):
    N = len(bounds) - 1
    inputs = make(B=1, T=bounds[-1], K=16, V=48)
    states = make(B=N, T=1, K=16, V=48)["initial_state"]
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, final = forward(inputs | {"initial_state": states}, cu_seqlens=cu, fixed_split=True)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = {name: inputs[name][:, begin:end] for name in NAMES}
        o_n, final_n = forward(alone | {"initial_state": states[n : n + 1]}, fixed_split=True)
        assert torch.equal(o[:, begin:end], o_n)
        assert torch.equal(final[n : n + 1], final_n)
        if begin == end:
            assert torch.equal(final[n], states[n])


def test_packed_sequences_without_a_state():
    inputs = make(B=1, T=66, state=False)
    _, final = forward(inputs, cu_seqlens=torch.tensor([0, 66, 66], dtype=torch.int32))
    check((forward(inputs)[0], final[:1]), inputs)
    assert not final[1].any()


def test_no_tokens():
    inputs = make(T=0)
    o, final = forward(inputs)
    assert o.shape == inputs["v"].shape
    assert torch.equal(final, inputs["initial_state"])


def test_strided_views():
    inputs = make(T=20)
    wide = {name: torch.stack([inputs[name], inputs[name]], -1)[..., 0] for name in (*NAMES, "initial_state")}
    for ours, same in zip(forward(wide), forward(inputs), strict=True):
        assert torch.equal(ours, same)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"K": 24}, "K is 24, not a multiple of 16 up to 256"),
        ({"V": 20}, "V is 20, not a multiple of 16"),
        ({"dtype": torch.float64}, "q is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_cannot_run(sizes, reason):
    inputs = make(T=3, **sizes)
    with pytest.raises(NotImplementedError, match=reason):
        forward(inputs)
    assert chunk_gated_delta_rule(**inputs)[0].isfinite().all()  # the reference does


def test_intermediates():
    """What the backward builds on, in a table with unused slots, against its definition."""
    bounds = [0, 70, 70, 75]
    inputs = make(B=1, T=75)
    del inputs["initial_state"]
    table = chunk_table(1, 75, torch.tensor(bounds, dtype=torch.int32), 64)
    assert table.sequence.tolist() == [0, 0, 2, -1]
    assert table.begin[:3].tolist() == [0, 64, 70]
    assert table.end[:3].tolist() == [70, 70, 75]
    assert table.first_chunk.tolist() == [0, 2, 2, 3]

    gamma, a_inv, h, v_new, final = triton_chunk_fwd.intermediates(*inputs.values(), None, table)
    _, k, _, g, beta = (value[0].double() for value in inputs.values())
    for begin, end in [(0, 64), (64, 70), (70, 75)]:
        tokens = slice(begin, end)
        sums = g[tokens].cumsum(0)
        torch.testing.assert_close(gamma[tokens], sums, rtol=0, atol=1e-12)
        for head in range(2):
            ratio = (sums[:, None, head] - sums[None, :, head]).exp()
            low = (beta[tokens, head, None] * ratio * (k[tokens, 0] @ k[tokens, 0].T)).tril(-1)
            inverse = torch.linalg.inv(low + torch.eye(end - begin, dtype=torch.float64))
            torch.testing.assert_close(a_inv[tokens, head, : end - begin].double(), inverse, rtol=0, atol=1e-6)
            assert not a_inv[tokens, head, end - begin :].any()
    assert not h[0].any()
    assert not h[2].any()
    assert h[1].isfinite().all()
    assert v_new.isfinite().all()
    assert not final[1].any()
