"""HyloForCausalLM: published sizes, one result from every path, padding, save and load, rejected configurations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import hylo
from hylo.errors import UserError
from hylo.mixers import mla
from hylo.mixers.rope import Rotary
from hylo_ops import fused, mla_attention
from hylo_ops.testing import within_budget

PUBLISHED = {
    "Llama-4MLA12GDN": 1_673_797_776,
    "Llama-8MLA8GDN": 1_613_437_024,
    "Llama-6MLA22GDN": 4_267_821_452,
    "Llama-14MLA14GDN": 3_971_381_500,
    "Qwen-7MLA21GDN": 2_284_173_820,
    "Qwen-14MLA14GDN": 2_182_902_440,
    "Qwen-14MLA14M2": 2_065_541_280,
}
LAYOUTS = {
    "gdn": ["gated_deltanet", "mla", "gated_deltanet", "mla"],
    "mamba2": ["mla", "mamba2", "mamba2"],
    "mla": ["mla", "mla"],
    "linear": ["gated_deltanet", "mamba2"],
}


def make_config(layout="gdn", **changes):
    mixers = LAYOUTS[layout]
    return hylo.HyloConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": len(mixers),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "linear_num_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "mixer_types": list(mixers),
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        }
        | changes
    )


def make_model(layout="gdn", dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    return hylo.HyloForCausalLM(make_config(layout, **changes)).to(dtype).eval()


def tokens(batch=2, length=21, seed=1):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_parameter_totals(name, parameters):
    with torch.device("meta"):
        model = hylo.HyloForCausalLM(hylo.published_variants()[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_layouts_and_rope():
    short, long = hylo.published_variants(), hylo.published_variants(65536)
    assert short["Llama-4MLA12GDN"].mla_layers == [1, 5, 10, 14]
    assert short["Qwen-7MLA21GDN"].mla_layers == [1, 5, 9, 13, 17, 21, 25]
    assert [c["Llama-8MLA8M2"].rope_parameters["factor"] for c in (short, long)] == [4, 32]
    assert short["Qwen-14MLA14GDN"].rope_parameters["rope_type"] == "default"
    assert long["Qwen-14MLA14GDN"].rope_parameters["factor"] == 2
    with pytest.raises(UserError, match="8192 or 65536, got 4096"):
        hylo.published_variants(4096)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rope", [4, 0])
@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_every_path_gives_the_same_logits(layout, cache_class, qk_norm, rope):
    """One forward = uneven chunks through a cache = token by token (absorbed), in float64."""
    model = make_model(layout, qk_norm=qk_norm, qk_rope_head_dim=rope, qk_nope_head_dim=8 - rope)
    if qk_norm:
        for module in model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    ids = tokens()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cuts in ([5, 9, 1, 1, 5], [1] * 21, [20, 1]):
            cache = cache_class(config=model.config, **({"max_cache_len": 32} if cache_class is StaticCache else {}))
            parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(cuts, dim=1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_decode_is_absorbed_and_prefill_expanded(monkeypatch):
    model, calls = make_model(), []
    mixer = type(model.model.layers[1].mixer)
    for name in ("_absorbed", "_expanded", "_sliced", "_step_in_place"):
        original = getattr(mixer, name)
        monkeypatch.setattr(
            mixer, name, lambda *a, _name=name, _original=original, **k: (calls.append(_name), _original(*a, **k))[1]
        )
    ids = tokens(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=cache, use_cache=True)
        assert calls == ["_expanded"] * 2 + ["_absorbed"] * 2
        calls.clear()
        static = StaticCache(config=model.config, max_cache_len=8)
        model(ids[:, :5], past_key_values=static, use_cache=True)
        keys = static.layers[1].keys
        model(ids[:, 5:], past_key_values=static, use_cache=True)
        assert calls == ["_expanded"] * 2 + ["_step_in_place"] * 2
        assert static.layers[1].keys.data_ptr() == keys.data_ptr()
        for again in (cache, static):
            calls.clear()
            model(ids[:, :2], past_key_values=again, use_cache=True)
            assert calls == ["_sliced"] * 2


@pytest.mark.parametrize("case", ["padded", "hole", "custom mask", "gradient"])
@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_what_a_slice_cannot_do_is_expanded_whole(monkeypatch, cache_class, case):
    """Rows that do not count, or a gradient: on the path that has a mask, and with its numbers."""
    model, calls = make_model("mla"), []
    original = type(model.model.layers[0].mixer)._expanded
    monkeypatch.setattr(
        type(model.model.layers[0].mixer), "_expanded", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    if case in ("padded", "hole"):
        mask[0, : 4 if case == "padded" else 0] = 0
        mask[0, 5] = int(case == "padded")
    full = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    custom, kept = case == "custom mask", 9 if cache_class is StaticCache else 6
    with torch.no_grad():
        whole = model(ids, attention_mask=full if custom else mask, use_cache=False).logits
        cache = cache_class(config=model.config, **({"max_cache_len": 9} if cache_class is StaticCache else {}))
        first = model(ids[:, :6], attention_mask=full[..., :6, :kept] if custom else mask[:, :6], past_key_values=cache)
    calls.clear()
    with torch.set_grad_enabled(case == "gradient"):
        second = model(ids[:, 6:], attention_mask=full[..., 6:, :] if custom else mask, past_key_values=cache)
    assert calls == [1, 1]
    seen = mask.bool() if case == "padded" else torch.ones_like(mask, dtype=torch.bool)
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found[seen], whole[seen], rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
def test_any_chunking_errs_no_more_than_one_pass(layout):
    """float32 logits against float64 ones of one pass: at most twice the error of one pass in float32."""
    exact, ids = make_model(layout), tokens(2, 96)
    model = copy.deepcopy(exact).float()
    with torch.no_grad():
        expected = exact(ids, use_cache=False).logits
        whole = model(ids, use_cache=False).logits
        for cuts in ([48, 48], [1, 32, 63], [7] * 13 + [5], [95, 1]):
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(cuts, dim=1)]
            within_budget(torch.cat(parts, 1), whole, expected)


def test_a_chunk_reads_the_rows_where_they_lie(monkeypatch):
    """No copy of a static cache, and no more of it than is filled."""
    model, calls = make_model("mla"), []
    original = mla.mla_prefill
    monkeypatch.setattr(mla, "mla_prefill", lambda *a, **k: (calls.append((a[2], k["lengths"])), original(*a, **k))[1])
    ids = tokens(2, 9)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        for part in ids.split([4, 3, 2], dim=1):
            model(part, past_key_values=cache)
    assert [lengths for _, lengths in calls] == [[7, 7]] * 2 + [[9, 9]] * 2
    for (rows, _), layer in zip(calls[2:], cache.layers, strict=True):
        assert rows.data_ptr() == layer.keys.data_ptr()


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_mamba2_decodes_in_one_fused_step(monkeypatch, cache_class):
    model, calls = make_model("linear"), []
    for name in ("mamba2_scan", "mamba2_step"):
        original = getattr(fused, name)
        monkeypatch.setattr(
            fused, name, lambda *a, _name=name, _original=original, **k: (calls.append(_name), _original(*a, **k))[1]
        )
    ids = tokens(2, 8)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = cache_class(config=model.config, **({"max_cache_len": 8} if cache_class is StaticCache else {}))
        parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 1, 1], dim=1)]
    assert calls == ["mamba2_scan"] * 2 + ["mamba2_step"] * 3
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_padding_leaves_no_trace_in_a_mamba2_state():
    """Though the convolution has a bias. No gradient comes from there either."""
    mixer = make_model("linear").model.layers[1].mixer
    x = torch.randn(1, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone, caches = mixer(x), []
    for padded, mask in ((F.pad(x, (0, 0, 3, 0), value=9.0), [0] * 3 + [1] * 7), (x, None)):
        cache = DynamicCache(config=make_config("linear"))
        y = mixer(padded, None if mask is None else torch.tensor([mask]), cache)
        torch.testing.assert_close(y[:, -7:], alone, rtol=0, atol=1e-12)
        caches.append(cache.layers[1].recurrent_states[0])
    torch.testing.assert_close(*caches, rtol=0, atol=1e-12)

    behind = F.pad(x, (0, 0, 0, 3), value=9.0).requires_grad_()
    mixer(behind, torch.tensor([[1] * 7 + [0] * 3])).sum().backward()
    assert behind.grad is not None
    assert behind.grad.isfinite().all()
    assert not behind.grad[:, 7:].any()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_cache_holds_one_row_a_token_and_one_state_a_sequence():
    model = make_model("gdn", qk_norm=True, dtype=torch.float32)
    cache = model(tokens(2, 7), use_cache=True).past_key_values
    assert type(cache) is DynamicCache
    assert cache.layers[1].keys.shape == (2, 1, 7, 16 + 4 + 2)
    assert cache.layers[1].values.shape == (2, 1, 7, 0)
    assert cache.layers[0].conv_states[0].shape == (2, 2 * 8 * 2 + 2 * 16, 4)
    assert cache.layers[0].recurrent_states[0].shape == (2, 2, 8, 16)
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generate_equals_greedy_by_hand(layout, implementation):
    model = make_model(layout)
    ids = tokens(2, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": implementation, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), expected)
    for chunk in (1, 2, 4, 9, 50):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), prefill_chunk_size=chunk, **settings)
        assert torch.equal(found, expected), f"prefill_chunk_size {chunk}"


def test_generate_of_a_purely_recurrent_model():
    model = make_model("linear")
    ids = tokens(2, 9)
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_left_padding_changes_nothing(layout, implementation):
    model = make_model(layout)
    short, long = tokens(1, 5, seed=3), tokens(1, 9, seed=4)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": implementation}
    both = model.generate(padded, attention_mask=mask, **settings)
    for row, alone in zip(both, (short, long), strict=True):
        single = model.generate(alone, attention_mask=torch.ones_like(alone), **settings)
        assert torch.equal(row[-6:], single[0, -6:])


def test_beam_search_reorders_the_states():
    model = make_model()
    ids = tokens(1, 6)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0
    )
    uncached = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
        use_cache=False,
    )
    assert torch.equal(found, uncached)


def test_logits_to_keep():
    model = make_model(dtype=torch.float32)
    ids = tokens()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])
    picked = torch.tensor([2, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=picked).logits, logits[:, picked])


@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_save_and_load(tmp_path, layout):
    model = make_model(layout, dtype=torch.float32, qk_norm=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), hylo.HyloConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(again, hylo.HyloForCausalLM)
    assert again.config.mixer_types == LAYOUTS[layout]
    ids = tokens()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_gradients_reach_every_parameter():
    for layout in LAYOUTS:
        model = make_model(layout, dtype=torch.float32, qk_norm=True).train()
        model(tokens(), labels=tokens()).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []


def test_gradient_checkpointing_gives_the_same_gradients():
    plain = make_model(dtype=torch.float32).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("cache_class", [None, DynamicCache, StaticCache])
def test_training_and_a_first_prefill_attend_in_one_op(cache_class, monkeypatch):
    """A prefill of an empty static cache reads none of its room; what a mask hides goes another way, as eager does."""
    seen = []
    monkeypatch.setattr(
        mla, "mla_attention", lambda q, k, v, **options: seen.append(k.shape) or mla_attention(q, k, v, **options)
    )
    model, ids = make_model("mla"), tokens()
    room = {"max_cache_len": 32} if cache_class is StaticCache else {}
    cache = cache_class and cache_class(config=model.config, **room)
    expected = model(ids, use_cache=False, attention_mask=padded(ids)).logits
    assert seen == []
    logits = model(ids, use_cache=cache is not None, past_key_values=cache).logits
    assert seen == [(2, 21, 2, 8)] * 2
    torch.testing.assert_close(logits[1], expected[1])
    if cache is not None:
        model(ids[:, :5], past_key_values=cache, use_cache=True)  # a chunk after others: not the first
    model.set_attn_implementation("eager")
    eager = model(ids, use_cache=False).logits  # its softmax is in fp32
    torch.testing.assert_close(eager, logits, rtol=0, atol=1e-5)
    assert len(seen) == 2


def padded(ids):
    """A mask that hides the first tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


def test_bf16_autocast_and_bf16_weights_run():
    model = make_model("mamba2", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens()).logits
    half = copy.deepcopy(model).to(torch.bfloat16)(tokens(), use_cache=True)
    assert torch.isfinite(mixed).all()
    assert torch.isfinite(half.logits).all()
    assert half.past_key_values.layers[1].recurrent_states[0].dtype == torch.float32


def test_compiles_without_a_graph_break():
    model = make_model(dtype=torch.float32)
    ids = tokens()
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)


def test_yarn_stretches_the_rope_slice_alone():
    """Angles and factor against transformers' own YaRN of a head as wide as the slice."""
    config = make_config(
        qk_rope_head_dim=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    )
    cos, sin = Rotary(config)(torch.tensor([[0, 1, 5000]]), torch.float32)
    assert cos.shape == (1, 3, 32)
    torch.testing.assert_close(cos[0, 0], torch.full((32,), 0.1 * torch.log(torch.tensor(4.0)).item() + 1))
    wide = copy.copy(config)
    wide.head_dim = 32
    inverse, factor = ROPE_INIT_FUNCTIONS["yarn"](wide, torch.device("cpu"))
    torch.testing.assert_close(sin[0, 2, :16], (5000 * inverse).sin() * factor)
    # ramp of recipe 1.8: pairs up to 2 keep the base frequency, pairs from 8 on are divided by the factor
    base = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    ratio = inverse / base
    torch.testing.assert_close(ratio[:3], torch.ones(3))
    torch.testing.assert_close(ratio[8:], torch.full((8,), 0.25))
    assert ((ratio[3:8] < 1) & (ratio[3:8] > 0.25)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["mla", "attention", "mla", "mla"]}, "got 'attention'"),
        ({"mixer_types": ["mla"]}, "num_hidden_layers = 4, got 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be positive, got 0"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even and not negative, got 3"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads, got 4 and 3"),
    ],
)
def test_rejected_configurations(changes, message):
    with pytest.raises(UserError, match=message):
        make_config(**changes)
