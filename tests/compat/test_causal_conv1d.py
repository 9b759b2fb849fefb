"""compat.causal_conv1d: forms, states of other lengths, resets, and what it refuses (test_mamba_ssm.py: in models)."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2

from hylo_ops import causal_conv1d
from hylo_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

DTYPE = torch.float64
B, D, T = 3, 5, 11


def make(W=4, T=T):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=DTYPE)

    return {"x": normal(B, D, T), "weight": normal(D, W), "bias": normal(D)}


def plain(x, weight, bias, before=None, activation=None):
    """PyTorch's own convolution; `before` are the inputs before the first."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    y = F.conv1d(torch.cat([before, x], -1), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if activation else y


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_equals_pytorchs_convolution(W, activation):
    inputs = make(W)
    torch.testing.assert_close(
        causal_conv1d_fn(**inputs, activation=activation), plain(**inputs, activation=activation), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("T", [1, 2, 11])
@pytest.mark.parametrize("written_to", [False, True])
def test_states(T, written_to):
    inputs, before = make(T=T), torch.randn(B, D, 3, dtype=DTYPE)
    place = torch.full((B, D, 3), torch.nan, dtype=DTYPE) if written_to else None
    y, final = causal_conv1d_fn(
        **inputs, initial_states=before, return_final_states=True, final_states_out=place, activation="silu"
    )
    torch.testing.assert_close(y, plain(**inputs, before=before, activation="silu"), rtol=0, atol=1e-12)
    assert torch.equal(final, torch.cat([before, inputs["x"]], -1)[..., -3:])
    assert (final is place) == written_to


def test_gradients():
    inputs = {name: value.requires_grad_() for name, value in make().items()}
    before = torch.randn(B, D, 3, dtype=DTYPE, requires_grad=True)
    leaves = [*inputs.values(), before]
    y, final = causal_conv1d_fn(**inputs, initial_states=before, return_final_states=True, activation="silu")
    found = torch.autograd.grad(y.square().sum() + final.sum(), leaves)
    expected = plain(**inputs, before=before, activation="silu").square().sum()
    wanted = torch.autograd.grad(expected + torch.cat([before, inputs["x"]], -1)[..., -3:].sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_resets_in_rows_and_padding():
    inputs, before = make(), torch.randn(B, D, 3, dtype=DTYPE)
    lengths = [[2, 4, 3, 2], [11], [1, 10]]
    numbers = [[0, 1, 2, -1], [0], [5, 3]]
    seq_idx = torch.stack(
        [torch.tensor(n).repeat_interleave(torch.tensor(length)) for n, length in zip(numbers, lengths, strict=True)]
    )
    y = causal_conv1d_fn(**inputs, seq_idx=seq_idx.int(), initial_states=before, activation="silu")
    for row in range(B):
        parts = inputs["x"][row : row + 1].split(lengths[row], dim=-1)
        for i, (found, part) in enumerate(zip(y[row : row + 1].split(lengths[row], dim=-1), parts, strict=True)):
            initial = before[row : row + 1] if i == 0 else None
            expected = plain(part, inputs["weight"], inputs["bias"], initial, "silu")
            padding = numbers[row][i] < 0
            torch.testing.assert_close(found, torch.zeros_like(expected) if padding else expected, rtol=0, atol=1e-12)


def test_several_tokens_equal_the_eager_form_of_a_model():
    """Of transformers, written apart from ours; it keeps a state of width inputs."""
    eager, inputs = inspect.unwrap(modeling_mamba2.causal_conv1d_update), make(T=3)
    states = [torch.randn(B, D, 4, generator=torch.Generator().manual_seed(1), dtype=DTYPE) for _ in range(2)]
    assert torch.equal(*states)
    expected = eager(inputs["x"], states[0], inputs["weight"], inputs["bias"], "silu")
    y = causal_conv1d_update(inputs["x"], states[1], inputs["weight"], inputs["bias"], "silu")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(*states)


@pytest.mark.parametrize("T", [1, 2, 7])
@pytest.mark.parametrize("state_len", [3, 4, 6])
def test_updates_of_states_of_any_length(T, state_len):
    inputs, state = make(T=T), torch.randn(B, D, state_len, dtype=DTYPE)
    seen = torch.cat([state, inputs["x"]], -1)
    expected = plain(**inputs, before=state[..., -3:], activation="silu")
    y = causal_conv1d_update(**{**inputs, "conv_state": state}, activation="silu")
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(state, seen[..., -state_len:])


def test_one_token_without_a_dim_for_time():
    inputs, state = make(T=1), torch.randn(B, D, 4, dtype=DTYPE)
    states = state.clone(), state.clone()
    y = causal_conv1d_update(inputs["x"][..., 0], states[0], inputs["weight"])
    assert torch.equal(y, causal_conv1d_update(inputs["x"], states[1], inputs["weight"])[..., 0])
    assert torch.equal(*states)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("state_len", [3, 4, 5])
@pytest.mark.parametrize("indices", [[4, -1, 0], [-1, 1, -1], [-1, -1, -1], [0, 2, 3], [-1, 0, 5]])
def test_a_pool_with_padding(T, state_len, indices):
    inputs, pool = make(T=T), torch.randn(6, D, state_len, dtype=DTYPE)
    before, rows = pool.clone(), torch.tensor(indices, dtype=torch.int32)
    y = causal_conv1d_update(**{**inputs, "conv_state": pool}, conv_state_indices=rows)
    untouched = set(range(6))
    for n, row in enumerate(indices):
        if row < 0:
            assert not y[n].any()
            continue
        untouched.discard(row)
        state = before[row : row + 1].clone()
        x = inputs["x"][n : n + 1]
        expected = causal_conv1d_update(x, state, inputs["weight"], inputs["bias"])
        torch.testing.assert_close(y[n : n + 1], expected, rtol=0, atol=1e-12)
        assert torch.equal(pool[row : row + 1], state)
    for row in untouched:
        assert torch.equal(pool[row], before[row])


def test_a_prompt_and_steps_equal_one_pass():
    inputs = make()
    whole = causal_conv1d_fn(**inputs, activation="silu")
    begin = {**inputs, "x": inputs["x"][..., :6]}
    y, state = causal_conv1d_fn(**begin, return_final_states=True, activation="silu")
    parts = [y]
    state = state.clone()
    for t in range(6, T):
        parts.append(causal_conv1d_update(inputs["x"][..., t : t + 1], state, inputs["weight"], inputs["bias"], "silu"))
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-12)


def test_channels_next_to_each_other_are_not_copied(monkeypatch):
    """x [B, D, T] out of [B, T, D], as models have it, reaches the op as it lies in memory."""
    seen = []

    def recorded(x, *args, **options):
        seen.append(x.data_ptr())
        return causal_conv1d(x, *args, **options)

    monkeypatch.setattr("hylo_ops.compat.causal_conv1d.convolve", recorded)
    by_token = torch.randn(B, T, 2 * D, dtype=DTYPE)[..., :D]
    causal_conv1d_fn(by_token.transpose(1, 2), make()["weight"])
    assert seen == [by_token.data_ptr()]


def test_what_it_refuses():
    inputs, state = make(), torch.zeros(B, D, 4, dtype=DTYPE)
    seq_idx = torch.zeros(B, T, dtype=torch.int32)
    with pytest.raises(ValueError, match="activation must be one of"):
        causal_conv1d_fn(**inputs, activation="gelu")
    with pytest.raises(ValueError, match="return_final_states does not go with seq_idx"):
        causal_conv1d_fn(**inputs, seq_idx=seq_idx, return_final_states=True)
    with pytest.raises(ValueError, match=r"seq_idx must have shape \[3, 11\], got \[2, 11\]"):
        causal_conv1d_fn(**inputs, seq_idx=seq_idx[:2])
    with pytest.raises(ValueError, match=r"initial_states must have shape \[3, 5, 3\], got \[3, 5, 4\]"):
        causal_conv1d_fn(**inputs, initial_states=state)
    with pytest.raises(TypeError, match="unexpected keyword argument 'final_state'"):
        causal_conv1d_fn(**inputs, final_state=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seq_lens_q'"):
        causal_conv1d_fn(**inputs, cu_seq_lens_q=None)
    assert causal_conv1d_fn(**inputs, seq_idx=seq_idx, cu_seq_lens_q=None, use_cache=False).shape == (B, D, T)
    with pytest.raises(NotImplementedError, match="cache_seqlens is not supported"):
        causal_conv1d_update(inputs["x"], state, inputs["weight"], cache_seqlens=torch.zeros(B, dtype=torch.int32))
    with pytest.raises(ValueError, match="conv_state must hold at least 3 inputs, got 2"):
        causal_conv1d_update(inputs["x"], state[..., :2], inputs["weight"])
    with pytest.raises(ValueError, match=r"must have one row a sequence \(3\), got 2"):
        causal_conv1d_update(inputs["x"], state[:2], inputs["weight"])
