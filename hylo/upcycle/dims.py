"""Dims of a hybrid from those of its base: the published ones where the paper has them, else in proportion."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hylo.config import LINEAR_MIXERS, HyloConfig, place_mla, published_variants
from hylo.errors import UserError

DIMS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "linear_num_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
)
_GEOMETRY = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
_COPIED = (
    *_GEOMETRY,
    "vocab_size",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def hybrid_config(
    base: PreTrainedConfig,
    *,
    mixer: str,
    mla_layers: Sequence[int],
    rope_parameters: dict[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    **dims: int | None,
) -> HyloConfig:
    """Configuration of the hybrid of a Llama or Qwen3 base.

    Args:
        mixer: "gated_deltanet" or "mamba2", for every layer that is not in `mla_layers`.
        mla_layers: counted from 0; empty for a pure linear model, all of them for a pure MLA model.
        rope_parameters: of the MLA rope slice; None takes the base's.
        dims: any of `DIMS`; None or left out means the default.
    Raises:
        UserError: a layer is out of range or named twice, a rank is not positive or larger than the base's weights
            allow, or the widths do not fit the base's heads.
    """
    _check_layers(mla_layers, base.num_hidden_layers)
    if mixer not in LINEAR_MIXERS:
        raise UserError(f"mixer must be one of {', '.join(LINEAR_MIXERS)}, got {mixer!r}")
    unknown = sorted(set(dims) - set(DIMS))
    if unknown:
        raise UserError(f"unknown dimension {unknown[0]!r}; known are {', '.join(DIMS)}")
    given = {name: value for name, value in dims.items() if value is not None}
    chosen = default_dims(base) | given
    if "qk_rope_head_dim" in given and "qk_nope_head_dim" not in given:
        chosen["qk_nope_head_dim"] = base.head_dim - given["qk_rope_head_dim"]
    _check_dims(chosen, base)
    values = {name: getattr(base, name) for name in _COPIED} | chosen
    if max_position_embeddings is not None:
        values["max_position_embeddings"] = max_position_embeddings
    return HyloConfig(
        **values,
        qk_norm=base.model_type == "qwen3",
        rope_parameters=dict(rope_parameters or base.rope_parameters),
        mixer_types=place_mla(base.num_hidden_layers, mla_layers, mixer),
        tie_word_embeddings=False,
    )


def default_dims(base: PreTrainedConfig) -> dict[str, int]:
    """The published dims of a base that the paper upcycles; for any other base the same proportions.

    Half of a head is rotated. The joint rank is an eighth of the rows of W_K and W_V, the query rank two thirds of the
    width. Gated DeltaNet heads hold up to four of the base's heads side by side (at most 256 wide), there are enough
    of them for three quarters of the query rows, and values are twice as wide as keys.
    """
    for variant in published_variants().values():
        if all(getattr(variant, name) == getattr(base, name) for name in _GEOMETRY):
            return {name: getattr(variant, name) for name in DIMS}
    head, d = base.head_dim, base.hidden_size
    query_rows, kv_rows = base.num_attention_heads * head, base.num_key_value_heads * head
    rope = head // 4 * 2
    key = min(256, 4 * head)
    return {
        "q_lora_rank": min(-(-2 * d // 24) * 8, d, query_rows),
        "kv_lora_rank": max(1, min(kv_rows // 4, d)),
        "qk_nope_head_dim": head - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": head,
        "linear_num_heads": max(1, -(-3 * query_rows // (4 * key))),
        "linear_key_head_dim": key,
        "linear_value_head_dim": 2 * key,
    }


def _check_layers(layers: Sequence[int], count: int) -> None:
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"MLA layer {layer} is out of range: the base has layers 0 to {count - 1}")
    twice = [layer for layer in layers if list(layers).count(layer) > 1]
    if twice:
        raise UserError(f"MLA layer {twice[0]} is named twice")


def _check_dims(dims: dict[str, int], base: PreTrainedConfig) -> None:
    for name in DIMS:
        if dims[name] < (0 if name == "qk_rope_head_dim" else 1):
            raise UserError(f"{name} must be positive, got {dims[name]}")
    if dims["qk_rope_head_dim"] % 2:
        raise UserError(f"qk_rope_head_dim must be even, got {dims['qk_rope_head_dim']}")
    head, d = base.head_dim, base.hidden_size
    limits = {
        "q_lora_rank": min(d, base.num_attention_heads * head),
        "kv_lora_rank": min(d, 2 * base.num_key_value_heads * head),
    }
    for name, limit in limits.items():
        if dims[name] > limit:
            raise UserError(f"{name} must be at most {limit}, the rank of the base's weights, got {dims[name]}")
    nope, rope = dims["qk_nope_head_dim"], dims["qk_rope_head_dim"]
    if nope + rope > head:
        raise UserError(
            f"qk_nope_head_dim + qk_rope_head_dim must be at most the base's head width {head}, got {nope} + {rope}"
        )
    if dims["v_head_dim"] != head:
        raise UserError(f"v_head_dim must be the base's head width {head}, got {dims['v_head_dim']}")
