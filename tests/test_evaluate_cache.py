"""Cache and state bytes: the published numbers from the formulas, and formulas against real caches."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from hylo import HyloConfig, HyloForCausalLM, published_variants
from hylo.errors import UserError
from hylo.evaluate import cache_bytes, crossover_tokens, measure_cache
from hylo.evaluate.cache import cache_percent
from tests import tiny

MIB = 2**20

# Bytes per token of the base and of the hybrid without key scales, fp32 GDN state in MiB, published KV percentage.
PUBLISHED = {
    "Llama-4MLA12GDN": (32_768, 1_280, 36, 3.9),
    "Llama-8MLA8GDN": (32_768, 2_560, 24, 7.8),
    "Llama-6MLA22GDN": (114_688, 2_304, 99, 2.0),
    "Llama-14MLA14GDN": (114_688, 5_376, 63, 4.7),
    "Qwen-7MLA21GDN": (114_688, 4_480, 63, 3.9),
    "Qwen-14MLA14GDN": (114_688, 8_960, 42, 7.8),
}


def base_config(hybrid: HyloConfig) -> LlamaConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return LlamaConfig(**{name: getattr(hybrid, name) for name in names})


@pytest.mark.parametrize("name", PUBLISHED)
def test_formulas_give_the_published_numbers(name):
    base_row, row, state, percent = PUBLISHED[name]
    config = published_variants()[name]
    hybrid, base = cache_bytes(config, torch.bfloat16), cache_bytes(base_config(config), torch.bfloat16)
    assert base.per_token == base_row
    assert hybrid.per_token - hybrid.key_scales_per_token == row
    assert hybrid.recurrent_state == state * MIB
    assert round(cache_percent(hybrid, base).published, 1) == percent


def test_qwen_key_scales_are_reported_beside_the_published_percentage():
    config = published_variants()["Qwen-7MLA21GDN"]
    hybrid = cache_bytes(config, torch.bfloat16)
    percent = cache_percent(hybrid, cache_bytes(base_config(config), torch.bfloat16))
    assert hybrid.key_scales_per_token == 7 * 8 * 2
    assert percent.published == pytest.approx(100 * 7 * 320 / (28 * 2048))
    assert percent.with_key_scales == pytest.approx(100 * 7 * 328 / (28 * 2048))


def test_mamba2_state():
    hybrid = cache_bytes(published_variants()["Llama-4MLA12M2"], torch.bfloat16)
    assert hybrid.recurrent_state == 12 * MIB // 2
    assert hybrid.conv_state == 12 * (32 * 64 + 2 * 8 * 64) * 4 * 2
    assert hybrid.state == hybrid.recurrent_state + hybrid.conv_state


def test_crossover():
    config = published_variants()["Llama-4MLA12GDN"]
    hybrid, base = cache_bytes(config, torch.bfloat16), cache_bytes(base_config(config), torch.bfloat16)
    equal = crossover_tokens(hybrid, base)
    assert hybrid.conv_state == 12 * 6 * (256 + 256 + 512) * 4 * 2
    assert equal == pytest.approx((36 * MIB + hybrid.conv_state) / (32_768 - 1_280))
    assert hybrid.total(math.floor(equal)) > base.total(math.floor(equal))
    assert hybrid.total(math.ceil(equal)) <= base.total(math.ceil(equal))
    assert crossover_tokens(base, hybrid) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_measured_cache_equals_the_formula(name, dtype):
    model = tiny.MODELS[name]().to(dtype)
    measured, formula = measure_cache(model), cache_bytes(model.config, dtype)
    assert (measured.per_token, measured.state) == (formula.per_token, formula.state)
    assert (formula.state > 0) == name.startswith("hylo")


def test_measured_cache_of_a_model_without_attention():
    config = tiny.hylo().config
    config = HyloConfig(**config.to_dict() | {"mixer_types": ["mamba2", "gated_deltanet"]})
    measured = measure_cache(HyloForCausalLM(config))
    assert measured.per_token == 0
    assert measured.state == cache_bytes(config, torch.float32).state


def test_cache_of_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="model type 'gemma2'"):
        cache_bytes(SimpleNamespace(model_type="gemma2"), torch.float32)


def test_a_cache_that_is_not_linear_is_refused():
    model = tiny.llama()
    forward = model.forward
    model.forward = lambda input_ids, **options: forward(input_ids[:, :20], **options)
    with pytest.raises(ValueError, match="not linear"):
        measure_cache(model, (16, 48))
