"""The gradients of the chunked gated delta rule in Triton against those of the reference in float64."""

import itertools

import pytest
import torch

from hylo_ops import chunk_gated_delta_rule
from hylo_ops.testing import cast, gradients, relative_error, within_budget
from tests.triton.gated_delta_rule_cases import NAMES, hostile_gates, make

SCALE = 0.3


def found(inputs, backend="triton", **options):
    """Gradients of a fixed random projection of o and the final state."""

    def function(**leaves):
        return chunk_gated_delta_rule(**leaves, scale=SCALE, backend=backend, **options)

    return gradients(function, inputs, [name for name in (*NAMES, "initial_state") if inputs.get(name) is not None])


def check(inputs, **options):
    """Every gradient within the error budget of float32."""
    ours, eager = found(inputs, **options), found(inputs, "reference", **options)
    exact = found(cast(inputs, torch.float64), "reference", **options)
    for name, truth in exact.items():
        assert ours[name].dtype == inputs[name].dtype
        within_budget(ours[name], eager[name], truth, name)
    return ours


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_lengths(T, state):
    check(make(T=T, state=state))


@pytest.mark.parametrize("K", [16, 48, 64, 128])
@pytest.mark.parametrize("V", [16, 48, 64])
def test_widths(K, V):
    """Of four heads: the error of one head's 65 gates is as much chance as arithmetic, on one CPU 2.1 times eager's."""
    check(make(T=65, K=K, V=V))


@pytest.mark.parametrize(("K", "V"), [(192, 80), (256, 48)])
def test_state_in_several_blocks(K, V):
    check(make(B=1, T=65, K=K, V=V))


@pytest.mark.parametrize(("G", "H"), [(1, 4), (2, 6), (3, 3)])
def test_shared_heads(G, H):
    check(make(B=1, T=65, G=G, H=H, K=48))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("G", "K"), [(2, 144), (1, 16)])
def test_narrow_dtypes(dtype, G, K):
    """Right to a unit in the last place: the interpreter truncates bf16, accuracy is for the GPU to show."""
    inputs = make(B=1, T=130, G=G, K=K, dtype=dtype)
    inputs["beta"] = inputs["beta"].float()
    ours, exact = found(inputs), found(cast(inputs, torch.float64), "reference")
    for name, truth in exact.items():
        assert ours[name].dtype == inputs[name].dtype
        assert relative_error(ours[name], truth) < 2 * torch.finfo(dtype).eps


def test_hostile_gates():
    inputs = hostile_gates(make(T=131))
    ours = check(inputs)
    resets = inputs["g"].isneginf()
    assert resets.any()
    assert not ours["g"][resets].any()
    assert all(gradient.isfinite().all() for gradient in ours.values())


def test_a_closed_gate_has_no_gradient():
    """What stands before a gate of -100 is forgotten, so nothing moves with it: sums that cancel would leave noise."""
    inputs = make(B=1, T=100)
    inputs["g"][0, 70] = -100
    gradient = found(inputs)["g"]
    assert gradient[0, 70].abs().max() < 1e-30
    assert gradient[0, 71].abs().min() > 1e-6


@pytest.mark.parametrize("state", [True, False], ids=["state", "zeros"])
def test_packed_sequences(state):
    inputs = make(B=1, T=135)
    inputs["initial_state"] = make(B=4, T=1)["initial_state"] if state else None
    check(inputs, cu_seqlens=torch.tensor([0, 70, 70, 71, 135], dtype=torch.int32))


def backward(inputs, do, d_final_state, cu_seqlens=None):
    """The bare op, with gradients of the outputs as they are given."""
    arguments = [inputs[name] for name in (*NAMES, "initial_state")]
    return torch.ops.hylo_ops.chunk_gated_delta_rule_backward(
        [do, d_final_state], *arguments, cu_seqlens, SCALE, True, "triton"
    )


def test_packed_sequences_equal_single_ones():
    bounds = [0, 0, 64, 69, 69]
    inputs = make(B=1, T=bounds[-1], V=48)
    inputs["initial_state"], d_final = (make(B=4, T=1, V=48, seed=seed)["initial_state"] for seed in (1, 2))
    do = torch.randn(inputs["v"].shape)
    *packed, d_initial = backward(inputs, do, d_final, torch.tensor(bounds, dtype=torch.int32))
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = {name: inputs[name][:, begin:end] for name in NAMES}
        part["initial_state"] = inputs["initial_state"][n : n + 1]
        *alone, d_initial_n = backward(part, do[:, begin:end], d_final[n : n + 1])
        assert all(torch.equal(ours[:, begin:end], same) for ours, same in zip(packed, alone, strict=True))
        assert torch.equal(d_initial[n : n + 1], d_initial_n)
        if begin == end:
            assert torch.equal(d_initial[n], d_final[n])


def test_same_bits_twice_and_in_any_batch():
    inputs = make(B=3, T=70, G=1, H=2)
    do, d_final = torch.randn(inputs["v"].shape), torch.randn(inputs["initial_state"].shape)
    first, second = (backward(inputs, do, d_final) for _ in range(2))
    alone = backward({name: value[1:2] for name, value in inputs.items()}, do[1:2], d_final[1:2])
    for ours, again, single in zip(first, second, alone, strict=True):
        assert torch.equal(ours, again)
        assert torch.equal(ours[1:2], single)


def test_strided_views_and_expanded_gradients():
    inputs = make(T=20)
    wide = {name: torch.stack([value, value], -1)[..., 0] for name, value in inputs.items()}
    expanded = torch.ones(1).expand(inputs["v"].shape), torch.zeros(1).expand(inputs["initial_state"].shape)
    ours, same = backward(wide, *expanded), backward(inputs, *(x.contiguous() for x in expanded))
    assert all(torch.equal(one, other) for one, other in zip(ours, same, strict=True))


def test_no_tokens():
    inputs = make(T=0)
    d_final = torch.randn(inputs["initial_state"].shape)
    *ours, d_initial = backward(inputs, torch.empty(inputs["v"].shape), d_final)
    assert [tuple(x.shape) for x in ours] == [tuple(inputs[name].shape) for name in NAMES]
    assert torch.equal(d_initial, d_final)
