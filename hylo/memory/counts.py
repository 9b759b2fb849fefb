"""Parameters of a model, part by part, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hylo.errors import UserError


@dataclass(frozen=True)
class Counts:
    """Elements of a model's parameters.

    Args:
        embedding: V D.
        matrices: for each layer, those of its linear maps, which autocast copies.
        vectors: for each layer, all others: norms, convolutions, decays.
        norm: of the final norm.
        head: V D, or 0 where the head is the embedding.
    """

    embedding: int
    matrices: tuple[int, ...]
    vectors: tuple[int, ...]
    norm: int
    head: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(m + v for m, v in zip(self.matrices, self.vectors, strict=True))

    @property
    def root(self) -> int:
        """Outside the layers."""
        return self.embedding + self.norm + self.head

    @property
    def total(self) -> int:
        return self.root + sum(self.layers)


def parameter_counts(config: Any) -> Counts:
    """Parameters by the formulas of docs/memory.md.

    Args:
        config: of a hylo, llama or qwen3 model.
    Raises:
        UserError: another model type, or a model with biases.
    """
    mixers = _mixers(config)
    mlp, norms = 3 * config.hidden_size * config.intermediate_size, 2 * config.hidden_size
    table = config.vocab_size * config.hidden_size
    return Counts(
        embedding=table,
        matrices=tuple(matrices + mlp for matrices, _ in mixers),
        vectors=tuple(vectors + norms for _, vectors in mixers),
        norm=config.hidden_size,
        head=0 if config.tie_word_embeddings else table,
    )


def _mixers(config: Any) -> list[tuple[int, int]]:
    """(matrices, vectors) of each layer's token mixer."""
    if config.model_type == "hylo":
        formulas = {"mla": _mla, "gated_deltanet": _gated_deltanet, "mamba2": _mamba2}
        return [formulas[mixer](config) for mixer in config.mixer_types]
    if config.model_type not in ("llama", "qwen3"):
        raise UserError(f"no memory formula for model type '{config.model_type}', only for hylo, llama and qwen3")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise UserError(f"no memory formula for a '{config.model_type}' model with {name}")
    return [_attention(config)] * config.num_hidden_layers


def _attention(config: Any) -> tuple[int, int]:
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    return config.hidden_size * heads * config.head_dim, 2 * config.head_dim if config.model_type == "qwen3" else 0


def _mla(config: Any) -> tuple[int, int]:
    d, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = config.q_lora_rank * (d + heads * config.qk_head_dim)
    latents = d * (rank + config.qk_rope_head_dim)
    return (
        queries + latents + up_projection(config) + heads * config.v_head_dim * d,
        2 * config.qk_head_dim if config.qk_norm else 0,
    )


def up_projection(config: Any) -> int:
    """Elements of MLA's up-projection from latents to keys and values."""
    return config.kv_lora_rank * config.num_key_value_heads * (config.qk_nope_head_dim + config.v_head_dim)


def _gated_deltanet(config: Any) -> tuple[int, int]:
    d, heads = config.hidden_size, config.linear_num_heads
    keys, values = heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    # q, k, v, gate, the two gates of a head, and the way out
    matrices = d * (2 * keys + 2 * values + 2 * heads) + values * d
    convolutions = config.linear_conv_kernel_dim * (2 * keys + values)
    return matrices, convolutions + 2 * heads + config.linear_value_head_dim


def _mamba2(config: Any) -> tuple[int, int]:
    d, heads = config.hidden_size, config.num_attention_heads
    inner, shared = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    matrices = d * (2 * inner + 2 * shared + heads) + inner * d
    return matrices, (config.linear_conv_kernel_dim + 1) * (inner + 2 * shared) + 3 * heads + inner
