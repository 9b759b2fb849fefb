"""Test helper: a byte-level tokenizer trained on the spot, tiny random models, and text to read."""

import random
from collections.abc import Callable
from functools import cache, partial

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hylo import HyloConfig, HyloForCausalLM

VOCAB = 384
_NOUNS = ("river", "stone", "garden", "letter", "window", "candle", "mountain", "sailor", "basket", "winter")
_VERBS = ("carries", "finds", "remembers", "paints", "follows", "opens", "forgets", "measures")


@cache
def text(sentences: int = 600, seed: int = 0) -> str:
    """Plain sentences without digits."""
    rng = random.Random(seed)
    parts = [f"The {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}." for _ in range(sentences)]
    return " ".join(parts)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB` tokens, with <bos>, <eos> and <pad>."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([text(seed=1)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=2048
    )


def _dimensions() -> dict[str, int]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def llama(seed: int = 0) -> LlamaForCausalLM:
    """Random Llama, fp32, 2 layers of width 32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_dimensions(), initializer_range=0.2)).eval()


def qwen3(seed: int = 0) -> Qwen3ForCausalLM:
    """Random Qwen3, fp32, 2 layers of width 32."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**_dimensions(), initializer_range=0.2)).eval()


def hylo(mixer: str = "gated_deltanet", qk_norm: bool = False, seed: int = 0) -> HyloForCausalLM:
    """Random hybrid of `mixer` and MLA, fp32, 2 layers of width 32."""
    torch.manual_seed(seed)
    latent = {"q_lora_rank": 24, "kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
    linear = {"linear_num_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
    config = HyloConfig(
        **_dimensions(), **latent, **linear, qk_norm=qk_norm, mixer_types=[mixer, "mla"], initializer_range=0.2
    )
    return HyloForCausalLM(config).eval()


MODELS: dict[str, Callable[[], LlamaForCausalLM | Qwen3ForCausalLM | HyloForCausalLM]] = {
    "llama": llama,
    "qwen3": qwen3,
    "hylo-gdn": hylo,
    "hylo-mamba2": partial(hylo, "mamba2"),
    "hylo-gdn-qk-norm": partial(hylo, qk_norm=True),
}
