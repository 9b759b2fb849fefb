"""compat.fla: a random Qwen3-Next gives the same on it as on its own eager form; options, misspelt names, states."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

import hylo_ops
from hylo_ops.compat import fla
from hylo_ops.gated_delta_rule import reference

VOCAB = 96
_FUNCTIONS = (
    *("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
    *("causal_conv1d_fn", "causal_conv1d_update"),
)


@pytest.fixture(scope="module")
def model():
    config = Qwen3NextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def eager_form(monkeypatch):
    """Qwen3-Next on plain PyTorch, also where the libraries that it prefers are installed."""
    for name in _FUNCTIONS:
        plain = inspect.unwrap(getattr(qwen3_next, name))
        assert plain.__globals__ is vars(qwen3_next)
        monkeypatch.setattr(qwen3_next, name, plain)


@pytest.fixture
def on_ours(monkeypatch, eager_form):
    """A switch: from its call on, Qwen3-Next runs on our functions; gives the list of calls they get."""
    calls = []

    def recorded(function):
        def call(*args, **keywords):
            calls.append(function.__name__)
            return function(*args, **keywords)

        return call

    def switch():
        monkeypatch.setattr(qwen3_next, "torch_chunk_gated_delta_rule", recorded(fla.chunk_gated_delta_rule))
        monkeypatch.setattr(
            qwen3_next, "torch_recurrent_gated_delta_rule", recorded(fla.fused_recurrent_gated_delta_rule)
        )
        return calls

    return switch


def tokens(B=2, T=150):
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


def logits_and_gradients(model):
    model.zero_grad()
    output = model(tokens(), labels=tokens(), use_cache=False, output_router_logits=True)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_qwen3_next_has_the_same_logits_and_gradients(model, on_ours):
    logits, gradients = logits_and_gradients(model)
    calls = on_ours()
    found, found_gradients = logits_and_gradients(model)
    assert calls == ["chunk_gated_delta_rule"] * 3
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert found_gradients.keys() == gradients.keys()
    assert any("A_log" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def decoded(model):
    """Logits of a prompt, of single tokens after it, and of three more at once."""
    output = model(tokens(T=70), use_cache=True)
    parts, cache = [output.logits], output.past_key_values
    for piece in (*tokens(T=5).split(1, dim=1), tokens(T=3)):
        parts.append(model(piece, past_key_values=cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


def test_qwen3_next_decodes_the_same(model, on_ours):
    expected = decoded(model)
    calls = on_ours()
    found = decoded(model)
    assert calls.count("fused_recurrent_gated_delta_rule") == 3 * 5
    assert calls.count("chunk_gated_delta_rule") == 3 * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_qwen3_next_generates_the_same(model, on_ours):
    def generate():
        return model.generate(tokens(T=9), max_new_tokens=6, do_sample=False, pad_token_id=0)

    expected = generate()
    on_ours()
    assert torch.equal(generate(), expected)


def make(B=2, T=9, G=2, H=4, K=8, V=12, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tensors = (
        normal(B, T, G, K),
        normal(B, T, G, K),
        normal(B, T, H, V),
        F.logsigmoid(normal(B, T, H) + 2),
        normal(B, T, H).sigmoid(),
    )
    return [t.to(dtype) for t in tensors], normal(B, H, K, V)


def normalised(q, k):
    return [x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k)]


@pytest.mark.parametrize("T", [1, 9, 70])
def test_recurrent_and_chunk_equal_the_definition(T):
    (q, k, v, g, beta), state = make(T=T)
    before = state.clone()
    expected, final = reference.step_by_step(*normalised(q, k), v, g, beta, 0.3, state)
    options = {"scale": 0.3, "initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        o, found = function(q, k, v, g=g, beta=beta, **options)
        torch.testing.assert_close(o, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(found, final, rtol=0, atol=1e-10)
        assert torch.equal(state, before)
        assert found.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("T", [1, 5])
def test_without_a_state_a_gate_or_a_strength(T):
    (q, k, v, g, beta), _ = make(T=T)
    q, k = normalised(q, k)
    o, final = fla.fused_recurrent_gated_delta_rule(q, k, v)
    expected, _ = hylo_ops.chunk_gated_delta_rule(q, k, v, torch.zeros_like(g), torch.ones_like(beta))
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-10)
    assert final is None


def test_one_token_that_wants_a_gradient_gets_it():
    (q, k, v, g, beta), state = make(T=1)
    state.requires_grad_()
    o, final = fla.fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, initial_state=state, output_final_state=True)
    (found,) = torch.autograd.grad(o.sum() + final.sum(), state)
    expected_o, expected_final = hylo_ops.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state)
    (expected,) = torch.autograd.grad(expected_o.sum() + expected_final.sum(), state)
    torch.testing.assert_close(found, expected)


def test_packed_sequences_take_long_bounds():
    (q, k, v, g, beta), _ = make(B=1, T=12)
    bounds = torch.tensor([0, 5, 5, 12])
    states = torch.randn(3, 4, 8, 12, dtype=torch.float64)
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        o, final = function(q, k, v, g, beta=beta, initial_state=states, output_final_state=True, cu_seqlens=bounds)
        expected, expected_final = hylo_ops.chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=states, cu_seqlens=bounds.int()
        )
        assert torch.equal(o, expected)
        assert torch.equal(final, expected_final)


@pytest.mark.parametrize("T", [1, 9])
def test_half_precision_keeps_its_dtype_and_a_float32_state(T):
    tensors, state = make(T=T, dtype=torch.bfloat16)
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        q, k, v, g, beta = tensors
        o, final = function(
            q, k, v, g, beta=beta, initial_state=state.bfloat16(), output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("function", [fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule])
def test_a_misspelt_or_missing_option_is_refused(function):
    (q, k, v, g, beta), _ = make()
    function(q, k, v, g, beta=beta, use_cache=True, output_router_logits=False)
    for name in ("head_first", "use_gate_in_kernel", "inital_state"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            function(q, k, v, g, beta=beta, **{name: True})
