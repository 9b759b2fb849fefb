"""Cache bytes per token and state bytes per sequence: from the config's dimensions, and measured on a real cache."""

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from hylo.errors import UserError
from hylo.evaluate.common import evaluating

_STATE_ITEMSIZE = 4  # recurrent states are kept in fp32 whatever the model's dtype
_KEY_VALUE_MODELS = ("llama", "qwen3")


class CacheBytes(BaseModel):
    """What one sequence costs in memory. `key_scales_per_token` is contained in `per_token`."""

    model_config = ConfigDict(frozen=True)

    per_token: int  # bytes that every token adds, all layers together
    key_scales_per_token: int  # share of the key scales that a k-norm asks for, absent in the published percentages
    recurrent_state: int  # bytes per sequence, fp32
    conv_state: int  # bytes per sequence, model dtype

    @property
    def state(self) -> int:
        """Bytes per sequence that do not grow with its length."""
        return self.recurrent_state + self.conv_state

    def total(self, tokens: int) -> int:
        """Bytes of one sequence of `tokens` tokens."""
        return self.state + tokens * self.per_token


def cache_bytes(config: Any, dtype: torch.dtype) -> CacheBytes:
    """Cache and state bytes from the formulas.

    Llama and Qwen3 layers keep 2 * Hkv * head_dim elements a token. An MLA layer keeps one row of R + E elements,
    and Hkv key scales more under a k-norm. Recurrent states per sequence are fp32: H * K * V (GDN) or
    Hq * head_dim * head_dim (Mamba2). Conv states are channels * W in `dtype`, with channels 2 H K + H V (GDN) or
    (Hq + 2 Hkv) * head_dim (Mamba2).

    Args:
        config: of a Llama, Qwen3 or HyLo model.
        dtype: of the cache, i.e. of the model's activations.
    Raises:
        UserError: another model type.
    """
    if config.model_type in _KEY_VALUE_MODELS:
        elements = 2 * config.num_key_value_heads * config.head_dim
        per_token = config.num_hidden_layers * elements * dtype.itemsize
        return CacheBytes(per_token=per_token, key_scales_per_token=0, recurrent_state=0, conv_state=0)
    if config.model_type != "hylo":
        raise UserError(f"no cache formula for model type '{config.model_type}', only for hylo, llama and qwen3")
    layers = {kind: config.mixer_types.count(kind) for kind in ("mla", "gated_deltanet", "mamba2")}
    scales = layers["mla"] * (config.num_key_value_heads if config.qk_norm else 0)
    rows = layers["mla"] * (config.kv_lora_rank + config.qk_rope_head_dim)
    recurrent = layers["gated_deltanet"] * _gdn_state(config) + layers["mamba2"] * _mamba2_state(config)
    channels = layers["gated_deltanet"] * _gdn_channels(config) + layers["mamba2"] * _mamba2_channels(config)
    return CacheBytes(
        per_token=(rows + scales) * dtype.itemsize,
        key_scales_per_token=scales * dtype.itemsize,
        recurrent_state=recurrent * _STATE_ITEMSIZE,
        conv_state=channels * config.linear_conv_kernel_dim * dtype.itemsize,
    )


def _gdn_state(config: Any) -> int:
    return config.linear_num_heads * config.linear_key_head_dim * config.linear_value_head_dim


def _gdn_channels(config: Any) -> int:
    return config.linear_num_heads * (2 * config.linear_key_head_dim + config.linear_value_head_dim)


def _mamba2_state(config: Any) -> int:
    return config.num_attention_heads * config.head_dim**2


def _mamba2_channels(config: Any) -> int:
    return (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim


def crossover_tokens(hybrid: CacheBytes, teacher: CacheBytes) -> float | None:
    """Context length from which the hybrid needs less memory than the teacher; None where that never happens."""
    saved = teacher.per_token - hybrid.per_token
    if saved <= 0:
        return None
    return max(0.0, (hybrid.state - teacher.state) / saved)


class CachePercent(BaseModel):
    """Growth per token relative to the teacher's, percent; state is left out of both (see `crossover_tokens`)."""

    model_config = ConfigDict(frozen=True)

    published: float  # without key scales, as the paper counts
    with_key_scales: float


def cache_percent(hybrid: CacheBytes, teacher: CacheBytes) -> CachePercent:
    """KV% of the hybrid, the way the paper counts and in full."""
    without_scales = hybrid.per_token - hybrid.key_scales_per_token
    return CachePercent(
        published=100 * without_scales / teacher.per_token,
        with_key_scales=100 * hybrid.per_token / teacher.per_token,
    )


class MeasuredCache(BaseModel):
    """Cache growth and constant part, read off a model's own cache after two prefills."""

    model_config = ConfigDict(frozen=True)

    per_token: int  # bytes
    state: int  # bytes per sequence
    lengths: tuple[int, int]  # tokens of the two prefills


def cache_nbytes(cache: Any) -> int:
    """Bytes of all tensors that a transformers cache holds: keys, values, conv and recurrent states."""
    total = 0
    for layer in cache.layers:
        tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            tensors.extend(states.values())
        total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total


def measure_cache(model: Any, lengths: tuple[int, int] = (16, 48)) -> MeasuredCache:
    """Prefill two lengths: the difference over the tokens is bytes per token, the intercept the state.

    Raises:
        ValueError: a third prefill, at the mean length, is not on that line: the cache is not linear in the tokens
            (a sliding window, say) and two numbers cannot describe it.
    """
    middle = sum(lengths) // 2
    short, between, long = (_prefill_bytes(model, length) for length in (lengths[0], middle, lengths[1]))
    per_token = (long - short) // (lengths[1] - lengths[0])
    state = short - lengths[0] * per_token
    if (between, long) != (state + middle * per_token, state + lengths[1] * per_token):
        measured = f"{short} at {lengths[0]}, {between} at {middle}, {long} at {lengths[1]}"
        raise ValueError(f"cache bytes are not linear in the tokens: {measured}")
    return MeasuredCache(per_token=per_token, state=state, lengths=lengths)


def _prefill_bytes(model: Any, length: int) -> int:
    ids = torch.arange(length, device=model.device)[None] % model.config.vocab_size
    with evaluating(model):
        return cache_nbytes(model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values)
