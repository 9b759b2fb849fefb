"""Test helper: random bases to upcycle, and configurations of hybrids of them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hylo.upcycle import hybrid_config

FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip


def make_base(family="llama", **changes):
    """Random base in float64; its norms' weights are not 1, so that forgetting one shows."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**(SIZES | {"initializer_range": 0.3, **changes}))).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return model


def make_config(base, mla_layers=(0, 1, 2), mixer="gated_deltanet", **dims):
    return hybrid_config(base.config, mixer=mixer, mla_layers=mla_layers, **dims)
