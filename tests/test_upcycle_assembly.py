"""Whole hybrids: what is copied, the published dims, layers out of two models, the written directory."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

import hylo
from hylo.errors import UserError
from hylo.upcycle import assemble, build_hybrid, default_dims, hybrid_config, load_base, upcycle
from tests import tiny
from tests.upcycle_models import FAMILIES, make_base, make_config


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_but_the_mixers_is_copied(family, mixer):
    base = make_base(family, tie_word_embeddings=True)
    hybrid, _ = build_hybrid(base, make_config(base, [1], mixer))
    source, target = base.state_dict(), hybrid.state_dict()
    shared = [name for name in target if ".mixer." not in name]
    assert len(shared) == 3 + 3 * 5
    assert all(torch.equal(target[name], source[name]) for name in shared)
    assert hybrid.lm_head.weight.data_ptr() != hybrid.model.embed_tokens.weight.data_ptr()
    assert hybrid.config.qk_norm == (family == "qwen3")
    assert torch.equal(hybrid.model.layers[1].mixer.o_proj.weight, base.model.layers[1].self_attn.o_proj.weight)


def test_defaults_are_the_published_dims_and_sizes():
    llama = {"vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8}
    sizes = {
        "Llama-4MLA12GDN": LlamaConfig(
            **llama, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64
        ),
        "Llama-6MLA22GDN": LlamaConfig(
            **llama, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128
        ),
        "Qwen-14MLA14M2": Qwen3Config(
            vocab_size=151936, intermediate_size=6144, num_key_value_heads=8, hidden_size=2048, num_hidden_layers=28,
            num_attention_heads=16, head_dim=128,
        ),
    }  # fmt: skip
    for name, base in sizes.items():
        published = hylo.published_variants()[name]
        mixer = next(mixer for mixer in published.mixer_types if mixer != "mla")
        config = hybrid_config(base, mixer=mixer, mla_layers=published.mla_layers)
        with torch.device("meta"):
            ours, theirs = (hylo.HyloForCausalLM(c).num_parameters() for c in (config, published))
        assert ours == theirs


def test_defaults_of_another_base_keep_the_published_proportions():
    dims = default_dims(
        LlamaConfig(hidden_size=64, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    )
    assert dims == {
        "q_lora_rank": 48, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "linear_num_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 64,
    }  # fmt: skip


def test_rope_parameters_are_passed_on():
    base = make_base()
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    config = make_config(base, rope_parameters=yarn, max_position_embeddings=256)
    assert config.rope_parameters == yarn
    assert config.max_position_embeddings == 256
    assert make_config(base).rope_parameters["rope_theta"] == base.config.rope_parameters["rope_theta"]


# --- Assembly


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_assembly_takes_each_layer_from_its_model(tmp_path, mixer):
    base = make_base("qwen3").float()
    mla, _ = build_hybrid(base, make_config(base, [0, 1, 2], mixer), seed=1)
    linear, _ = build_hybrid(base, make_config(base, [], mixer), seed=2)
    with torch.no_grad():
        linear.model.layers[0].mlp.up_proj.weight += 1  # alignment trains the MLPs as well
        mla.model.norm.weight += 1
    hybrid = assemble(mla, linear, [1])
    assert hybrid.config.mixer_types == [mixer, "mla", mixer]
    for i, source in ((0, linear), (1, mla), (2, linear)):
        expected = source.model.layers[i].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in hybrid.model.layers[i].state_dict().items())
    assert torch.equal(hybrid.model.norm.weight, mla.model.norm.weight)
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mixer_types"] == [mixer, "mla", mixer]
    ids = torch.randint(0, 61, (2, 13))
    torch.testing.assert_close(loaded(ids).logits, hybrid(ids).logits)


def test_assembly_from_directories(tmp_path):
    base = make_base().float()
    for name, layers in (("mla", [0, 1, 2]), ("linear", [])):
        build_hybrid(base, make_config(base, layers))[0].save_pretrained(tmp_path / name)
    assert assemble(tmp_path / "mla", tmp_path / "linear", [0, 2]).config.mla_layers == [0, 2]
    with pytest.raises(UserError, match="nowhere' is not the directory of a hybrid"):
        assemble(tmp_path / "nowhere", tmp_path / "linear", [0])


def test_assembly_refuses_what_does_not_fit():
    base = make_base().float()
    mla, _ = build_hybrid(base, make_config(base))
    mixed, _ = build_hybrid(base, make_config(base, [1]))
    with pytest.raises(UserError, match="layer 0 of the MLA model is a gated_deltanet layer"):
        assemble(mixed, mixed, [0])
    with pytest.raises(UserError, match="layer 1 of the linear model is a mla layer"):
        assemble(mla, mixed, [0])
    with pytest.raises(UserError, match="MLA layer 3 is out of range: the models have layers 0 to 2"):
        assemble(mla, mixed, [3])
    other = make_base(intermediate_size=44).float()
    with pytest.raises(UserError, match="intermediate_size is 40 in the one and 44 in the other"):
        assemble(mla, build_hybrid(other, make_config(other, []))[0], [0])


# --- The directory


@pytest.mark.parametrize(("family", "init"), [("llama", "published"), ("qwen3", "aligned")])
def test_upcycle_writes_a_model_that_loads_with_its_tokenizer(tmp_path, family, init):
    base = getattr(tiny, family)()
    base.generation_config.repetition_penalty = 1.5
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    result = upcycle(tmp_path / "base", mixer="gated_deltanet", mla_layers=[1], out=tmp_path / "out", init=init)
    assert result.out == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model, hylo.HyloForCausalLM)
    assert model.dtype == torch.float32
    assert model.generation_config.repetition_penalty == 1.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The river finds the garden.", return_tensors="pt").input_ids
    assert torch.equal(ids, tiny.tokenizer()("The river finds the garden.", return_tensors="pt").input_ids)
    assert model(ids).logits.isfinite().all()
    origin = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert origin["init"] == init
    assert origin["mixer_types"] == ["gated_deltanet", "mla"]
    assert 0 < origin["energy"]["1"]["key_value"] <= 1
    assert len(origin["unfitted"]) == (2 if init == "aligned" else 0)


def test_upcycle_is_deterministic_for_a_seed(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(name) + seed)  # the caller's generator plays no part
        upcycle(tmp_path / "base", mixer="mamba2", mla_layers=[0], out=tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_float64_base_stays_float64(tmp_path):
    make_base().save_pretrained(tmp_path / "base")
    model, _ = load_base(str(tmp_path / "base"))
    assert model.dtype == torch.float64
    make_base().bfloat16().save_pretrained(tmp_path / "half")
    assert load_base(str(tmp_path / "half"))[0].dtype == torch.float32
