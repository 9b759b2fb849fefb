"""compat.mamba_ssm: random Mamba2, Bamba and Zamba2 give the same on it, and on compat.causal_conv1d, as on their own
eager form; options, resets, and what it refuses."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2 import modeling_mamba2

from hylo_ops.compat.mamba_ssm import mamba_chunk_scan_combined, selective_state_update
from tests.compat import mamba2_models
from tests.compat.mamba2_models import MIXERS, MODULES, OURS, VOCAB, on_each_device

DTYPE = torch.float64


@pytest.fixture(scope="module", params=MODULES)
def model(request):
    model = mamba2_models.make(request.param)
    model.name = request.param
    return model


@pytest.fixture(autouse=True)
def full_precision():
    """A convolution of PyTorch on a GPU would round its inputs."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def on_ours(monkeypatch, model):
    """A switch: the model is on its eager form, and from the call on, on our functions; gives the calls they get."""
    module, calls = MODULES[model.name], []
    for name, function in mamba2_models.eager(model.name).items():
        monkeypatch.setattr(module, name, function)

    def recorded(name):
        def call(*args, **keywords):
            calls.append(name)
            return OURS[name](*args, **keywords)

        return call

    def switch():
        for name in OURS:
            monkeypatch.setattr(module, name, recorded(name))
        return calls

    return switch


def tokens(device="cpu", B=2, T=70, seed=1):
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)


def logits_and_gradients(model, device):
    model.zero_grad()
    output = model(tokens(device), labels=tokens(device), use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@on_each_device()
@pytest.mark.parametrize("training", [False, True])
def test_the_same_logits_and_gradients(model, on_ours, device, training):
    model.to(device).train(training)
    logits, gradients = logits_and_gradients(model, device)
    calls = on_ours()
    found, found_gradients = logits_and_gradients(model, device)
    assert calls == ["causal_conv1d_fn", "mamba2_chunk_scan"] * MIXERS[model.name]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert found_gradients.keys() == gradients.keys()
    for wanted in ("A_log", "dt_bias", "D", "conv1d.weight"):
        assert any(name.endswith(wanted) for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def decoded(model, device):
    """Logits of a prompt, of single tokens after it, and of three more at once."""
    output = model(tokens(device), use_cache=True)
    name = "cache_params" if hasattr(output, "cache_params") else "past_key_values"
    parts, cache = [output.logits], {name: getattr(output, name)}
    for piece in (*tokens(device, T=5, seed=2).split(1, dim=1), tokens(device, T=3, seed=3)):
        parts.append(model(piece, **cache, use_cache=True).logits)
    return torch.cat(parts, dim=1)


@on_each_device()
def test_decodes_the_same(model, on_ours, device):
    model.to(device).eval()
    expected = decoded(model, device)
    calls = on_ours()
    found = decoded(model, device)
    assert calls.count("mamba2_selective_state_update") == 5 * MIXERS[model.name]
    assert calls.count("causal_conv1d_update") == 5 * MIXERS[model.name]
    assert calls.count("mamba2_chunk_scan") == 2 * MIXERS[model.name]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def make(B=2, T=9, H=4, P=6, G=2, N=5, dtype=DTYPE):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=DTYPE)

    return {
        "x": normal(B, T, H, P).to(dtype),
        "dt": normal(B, T, H).to(dtype),
        "A": -normal(H).exp(),
        "B": normal(B, T, G, N).to(dtype),
        "C": normal(B, T, G, N).to(dtype),
        "D": normal(H),
        "dt_bias": normal(H),
        "initial_states": normal(B, H, P, N),
    }


def scan(inputs, **options):
    return mamba_chunk_scan_combined(**inputs, chunk_size=4, dt_softplus=True, **options)


def test_equals_the_eager_form_of_a_model():
    """Of transformers, written apart from ours."""
    eager, inputs = inspect.unwrap(modeling_mamba2.mamba2_chunk_scan), make()
    options = {"dt_softplus": True, "dt_limit": (0.1, 1.5), "return_final_states": True, "chunk_size": 4}
    eager_inputs = {name: value.float() for name, value in inputs.items()}
    expected = eager(hidden_states=eager_inputs.pop("x"), **eager_inputs, **options)
    found = mamba_chunk_scan_combined(**{name: value.float() for name, value in inputs.items()}, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_is_not_asked_for_is_not_given():
    inputs = make()
    o, final = scan(inputs, return_final_states=True)
    assert torch.equal(scan(inputs), o)
    assert final.shape == (2, 4, 6, 5)


@pytest.mark.parametrize("dtype", [DTYPE, torch.bfloat16])
def test_gate_and_skip_of_each_channel(dtype):
    inputs = make(dtype=dtype)
    z, D = torch.randn(2, 9, 4, 6, dtype=DTYPE).to(dtype), torch.randn(4, 6, dtype=DTYPE)
    plain = scan(inputs | {"D": None}).double()
    o = scan(inputs | {"D": D}, z=z)
    assert o.dtype == dtype
    expected = (plain + D * inputs["x"].double()) * F.silu(z.double())
    torch.testing.assert_close(o.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)


def test_the_limit_of_the_step_holds_without_softplus_too():
    inputs = make() | {"dt_bias": None}
    o = mamba_chunk_scan_combined(**inputs, chunk_size=4)
    expected = mamba_chunk_scan_combined(**inputs | {"dt": inputs["dt"].clamp(min=0)}, chunk_size=4)
    torch.testing.assert_close(o, expected)


SEQ_IDX = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
SPANS = [(0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 9)]  # row, first token, end


def part(inputs, row, begin, end):
    """A sequence alone; what comes first in its row has the initial state."""
    alone = {
        name: value[row : row + 1, begin:end] if name in ("x", "dt", "B", "C") else value
        for name, value in inputs.items()
    }
    initial = inputs["initial_states"]
    return alone | {"initial_states": initial[row : row + 1] if begin == 0 else None}


def test_resets_in_rows():
    inputs = {name: value.requires_grad_() for name, value in make().items()}
    o, final = scan(inputs, seq_idx=SEQ_IDX, return_final_states=True)
    parts = [scan(part(inputs, *span), return_final_states=True) for span in SPANS]
    expected = torch.stack([torch.cat([p[0][0] for p in parts[:3]]), parts[3][0][0]])
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(final, torch.cat([parts[2][1], parts[3][1]]), rtol=0, atol=1e-10)
    weights = torch.randn_like(o)
    leaves = list(inputs.values())
    found = torch.autograd.grad((o * weights).sum() + final.sum(), leaves, retain_graph=True)
    wanted = torch.autograd.grad((expected * weights).sum() + parts[2][1].sum() + parts[3][1].sum(), leaves)
    for name, a, b in zip(inputs, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bounds", [[0, 3, 7, 9], [0, 0, 3, 3, 7, 9, 9]])
def test_bounds_beside_the_marks_give_the_states_of_each_sequence(bounds):
    inputs = {
        name: value[:1] if name in ("x", "dt", "B", "C", "initial_states") else value for name, value in make().items()
    }
    cu_seqlens = torch.tensor(bounds)
    o, final, states = scan(
        inputs, seq_idx=SEQ_IDX[:1], cu_seqlens=cu_seqlens, return_final_states=True, return_varlen_states=True
    )
    marked, marked_final = scan(inputs, seq_idx=SEQ_IDX[:1], return_final_states=True)
    assert torch.equal(o, marked)
    assert torch.equal(final, marked_final)
    lengths = cu_seqlens.diff()
    assert not states[lengths == 0].any()
    parts = [scan(part(inputs, *span), return_final_states=True)[1] for span in SPANS[:3]]
    torch.testing.assert_close(states[lengths > 0], torch.cat(parts), rtol=0, atol=1e-10)


def test_bounds_alone_are_refused():
    inputs, bounds = make(B=1), torch.tensor([0, 9])
    with pytest.raises(ValueError, match="cu_seqlens needs seq_idx"):
        scan(inputs, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="return_varlen_states needs cu_seqlens"):
        scan(inputs, seq_idx=torch.zeros(1, 9, dtype=torch.int32), return_varlen_states=True)
    with pytest.raises(ValueError, match="with cu_seqlens the batch must be 1, got 2"):
        scan(make(), seq_idx=SEQ_IDX, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"seq_idx must have shape \[1, 9\], got \[2, 9\]"):
        scan(inputs, seq_idx=SEQ_IDX)


def step_inputs(dtype=DTYPE):
    """As models have them: numbers of a head, expanded."""
    inputs = make(T=1, dtype=dtype)
    x = inputs["x"][:, 0]
    return {
        "state": inputs["initial_states"].clone(),
        "x": x,
        "dt": inputs["dt"][:, 0, :, None].expand(2, 4, 6),
        "A": inputs["A"][:, None, None].expand(4, 6, 5),
        "B": inputs["B"][:, 0],
        "C": inputs["C"][:, 0],
        "D": inputs["D"][:, None].expand(4, 6),
        "dt_bias": inputs["dt_bias"][:, None].expand(4, 6),
        "z": torch.randn_like(x),
    }


def test_one_step_equals_the_eager_form_of_a_model():
    """Of transformers, written apart from ours."""
    inputs = step_inputs(torch.float32)
    inputs["state"] = inputs["state"].float()
    state = inputs["state"].clone()
    eager = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    others = {name: value.float() for name, value in inputs.items() if name not in ("state", "x")}
    expected = eager(state, inputs["x"], **others, dt_softplus=True)
    o = selective_state_update(**inputs, dt_softplus=True)
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(inputs["state"], state, rtol=1e-4, atol=1e-5)


def test_steps_go_on_where_the_scan_ends():
    inputs = make()
    o, final = scan(inputs, return_final_states=True)
    _, state = scan(
        {name: value[:, :8] if name in ("x", "dt", "B", "C") else value for name, value in inputs.items()},
        return_final_states=True,
    )
    last = {name: inputs[name][:, 8] for name in ("x", "B", "C")}
    heads = {name: inputs[name][:, None].expand(4, 6) for name in ("D", "dt_bias")}
    dt, A = inputs["dt"][:, 8, :, None].expand(2, 4, 6), inputs["A"][:, None, None].expand(4, 6, 5)
    step = selective_state_update(state, dt=dt, A=A, **last, **heads, dt_softplus=True)
    torch.testing.assert_close(step, o[:, 8], rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


def test_a_pool_with_padding():
    inputs = step_inputs()
    pool = torch.full((4, 4, 6, 5), torch.nan, dtype=DTYPE)
    pool[2] = inputs["state"][1]
    indices = torch.tensor([-1, 2], dtype=torch.int32)
    o = selective_state_update(**inputs | {"state": pool}, state_batch_indices=indices)
    expected = selective_state_update(**inputs)
    assert not o[0].any()
    assert torch.equal(o[1], expected[1])
    assert torch.equal(pool[2], inputs["state"][1])
    assert pool[[0, 1, 3]].isnan().all()


@pytest.mark.parametrize("name", ["dt", "A", "D", "dt_bias"])
def test_numbers_that_differ_within_a_head_are_refused(name):
    inputs = step_inputs()
    with pytest.raises(NotImplementedError, match=f"^{name} must be one number a head, repeated by expand"):
        selective_state_update(**inputs | {name: inputs[name].clone()})


def test_heads_of_one_number_are_tied_whatever_their_strides():
    inputs = {
        name: value[..., :1] if name in ("x", "dt", "D", "dt_bias", "z") else value
        for name, value in step_inputs().items()
    }
    inputs |= {"state": inputs["state"][:, :, :1].clone(), "A": inputs["A"][:, :1]}
    tied = selective_state_update(**inputs | {"state": inputs["state"].clone()})
    inputs |= {name: inputs[name].clone() for name in ("dt", "D", "dt_bias")}
    assert torch.equal(selective_state_update(**inputs), tied)


def test_a_state_without_heads_is_refused():
    inputs = step_inputs()
    with pytest.raises(NotImplementedError, match=r"Mamba1's without heads is not supported: got \[2, 6, 5\]"):
        selective_state_update(**inputs | {"state": inputs["state"][:, 0]})


def test_a_misspelt_or_missing_option_is_refused():
    inputs, step = make(), step_inputs()
    of_the_model = {"use_cache": True, "position_ids": None, "output_router_logits": False}
    scan(inputs, **of_the_model)
    selective_state_update(**step, **of_the_model)
    for name in ("seqidx", "dt_limits", "rmsnorm_weight", "cu_seq_lens_q"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            scan(inputs, **{name: None})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            selective_state_update(**step, **{name: None})
    scan(inputs, seq_idx=SEQ_IDX, cu_seq_lens_q=torch.tensor([0, 3, 7, 9, 18]))
