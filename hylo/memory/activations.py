"""Bytes a token that a layer keeps for its backward, and the room that it needs beside (docs/memory.md).

Letters as everywhere: D model width, H heads, K and V widths of a head; F is the width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STREAM = 4  # bytes of a number of the student's residual stream, which is fp32 as its weights are
_STATE_TOKENS = 64  # tokens between two states that the kernels keep in a backward
_RECORD_BYTES = 18432  # of the delta rule's kernels for 64 tokens of a head


@dataclass(frozen=True)
class Numbers:
    """How the student computes.

    Args:
        half: matrix products in bf16 (autocast), else in fp32.
        cuda: on a GPU, whose attention in fp32 wants keys and values for every head.
    """

    half: bool
    cuda: bool = True

    @property
    def size(self) -> int:
        """Bytes of a number in and out of a matrix product."""
        return 2 if self.half else 4

    def input(self, width: int) -> int:
        """What the linear maps that read one tensor keep: that, in the type of products as the norms make it."""
        return self.size * width

    def joined(self, width: int, of: int) -> int:
        """What is kept of a product of `width` columns in all of which `of` are read again: all, where it is one."""
        return self.size * (-(-width // 8) * 8 if self.half else of)


FACTOR = 4  # what a norm keeps of each vector beside its input


def kept_by_mlp(config: Any, numbers: Numbers, *, tiled: bool) -> int:
    """Input, gate, up and their product, in fp32 the activation too; tiled, the input alone."""
    wide = 0 if tiled else 3 if numbers.half and config.hidden_act == "silu" else 4
    return numbers.input(config.hidden_size) + wide * numbers.size * config.intermediate_size


def kept_by_mixer(config: Any, mixer: str, numbers: Numbers) -> int:
    return _KEPT[mixer](config, numbers)


def kept_by_layer(config: Any, mixer: str, numbers: Numbers, *, tiled: bool) -> int:
    """All but the stream that comes in; with the stream between mixer and MLP."""
    return kept_by_mixer(config, mixer, numbers) + FACTOR + second_half(config, numbers, tiled=tiled)


def second_half(config: Any, numbers: Numbers, *, tiled: bool) -> int:
    """What of a layer is gone once its backward has come to the mixer."""
    return STREAM * config.hidden_size + FACTOR + kept_by_mlp(config, numbers, tiled=tiled)


def _kept_by_mla(config: Any, numbers: Numbers) -> int:
    e, heads, shared = numbers.size, config.num_attention_heads, config.num_key_value_heads
    keys, values = config.qk_head_dim, config.v_head_dim
    row = config.kv_lora_rank + config.qk_rope_head_dim
    if numbers.cuda and not numbers.half:
        shared = heads  # the one attention that takes fp32 wants keys and values for every head
    attention = e * (heads * keys + shared * (keys + values)) + kept_by_attention(config, numbers)  # q, k, v before it
    queries = numbers.input(config.hidden_size) + numbers.joined(config.q_lora_rank + row, of=config.q_lora_rank)
    return queries + e * row + attention + (_kept_by_qk_norm(config, numbers) if config.qk_norm else 0)


def kept_by_attention(config: Any, numbers: Numbers) -> int:
    """What it returns: o and, in fp32, the log-sums of its weights."""
    return config.num_attention_heads * (numbers.size * config.v_head_dim + 4)


def _kept_by_qk_norm(config: Any, numbers: Numbers) -> int:
    heads, shared, keys = config.num_attention_heads, config.num_key_value_heads, config.qk_head_dim
    rope = config.qk_rope_head_dim
    row = config.kv_lora_rank + rope
    queries = heads * (numbers.size * keys + FACTOR)
    squares = 4 * shared * (config.qk_nope_head_dim + 1)  # of the unscaled keys, and what they come to
    unscaled = numbers.size * shared * keys
    if numbers.half:  # the rope part widened, and the scales
        return queries + squares + unscaled + 4 * rope + 2 * shared
    return queries + squares + unscaled + 4 * (row + shared)  # the row once more, with the scales


def _kept_by_gated_deltanet(config: Any, numbers: Numbers) -> int:
    e, heads = numbers.size, config.linear_num_heads
    keys, values = heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
    read = 2 * (keys + values)  # by the convolution and, the last ones, as the norm's gate
    projected = numbers.joined(read + 2 * heads, of=read)
    convolved = e * (2 * keys + values)
    gates = 4 * 4 * heads  # in and out of the softplus, decay, beta
    unit = 2 * (FACTOR * heads + e * keys)  # vectors of q and k, which are tensors of their own
    return numbers.input(config.hidden_size) + projected + convolved + gates + unit + 2 * e * values


def _kept_by_mamba2(config: Any, numbers: Numbers) -> int:
    inner, channels, projected = _mamba2_widths(config)
    kept = projected + channels + 2 * inner  # z, xbc and dt as they come; convolved; before and after the norm
    return numbers.input(config.hidden_size) + numbers.size * kept


def _mamba2_widths(config: Any) -> tuple[int, int, int]:
    """Heads side by side; channels of the convolution; what the way in makes."""
    inner = config.num_attention_heads * config.head_dim
    channels = inner + 2 * config.num_key_value_heads * config.head_dim
    return inner, channels, inner + channels + config.num_attention_heads


_KEPT = {"mla": _kept_by_mla, "gated_deltanet": _kept_by_gated_deltanet, "mamba2": _kept_by_mamba2}


def mlp_backward_room(config: Any, numbers: Numbers) -> int:
    """Gradients of the activation and of up, and of the stream in both types; a third of F's replaces the product."""
    return 2 * numbers.size * config.intermediate_size + (STREAM + numbers.size) * config.hidden_size


def mixer_backward_room(config: Any, mixer: str, numbers: Numbers) -> int:
    """Gradients in flight where most are, the workspace of the kernels with them, less what is gone by then.

    The stream's gradient in both types, and that of the normed stream.
    """
    stream = (2 * STREAM + numbers.size) * config.hidden_size
    return stream + _ROOMS[mixer](config, numbers.size)


def _mla_room(config: Any, e: int) -> int:
    """Gradients of o, q, k and v, and the fp32 sums that those of q are made in."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    keys, values = config.qk_head_dim, config.v_head_dim
    return e * (heads + shared) * (keys + values) + 4 * heads * (keys + 1)


def _gated_deltanet_room(config: Any, e: int) -> int:
    """Gradient of o; states and their gradients; written values and theirs; dq, dk, dv. Gone is what the
    norm read of o and made; its gate lies beside q, k and v."""
    heads, key, value = config.linear_num_heads, config.linear_key_head_dim, config.linear_value_head_dim
    states = (2 * e * key * value + _RECORD_BYTES) // _STATE_TOKENS
    return heads * (states + e * (4 * value + 2 * key - 2 * value))


def _mamba2_room(config: Any, e: int) -> int:
    """Gradients of o, z and of both ends of the convolution; states and theirs, as large as o each, of some heads at
    a time. What the norm kept of o and for the way out is gone."""
    inner, channels, _ = _mamba2_widths(config)
    return e * (4 * inner + 2 * channels - 2 * inner)


_ROOMS = {"mla": _mla_room, "gated_deltanet": _gated_deltanet_room, "mamba2": _mamba2_room}


def tile_room(config: Any, numbers: Numbers) -> int:
    """A token of a tile computed again, and its gradients."""
    return kept_by_mlp(config, numbers, tiled=False) + mlp_backward_room(config, numbers)


def mlp_forward_room(config: Any, size: int) -> int:
    """Activation, up and product: the gate is gone by then."""
    return 3 * size * config.intermediate_size


def student_forward_room(config: Any, mixer: str, numbers: Numbers) -> tuple[int, int]:
    """Where a layer keeps nothing: the room of its mixer, and of its MLP without its own three tensors.

    A mixer has no more at one time than what it otherwise keeps.
    """
    return kept_by_mixer(config, mixer, numbers), numbers.input(config.hidden_size)


def teacher_forward_room(config: Any, size: int) -> tuple[int, int]:
    """The room of attention, stream and normed stream with it, and of the MLP likewise without its own three tensors.

    Queries are rotated in four tensors of their size; a norm widens its input to fp32 twice.
    """
    d, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = 4 * size * config.num_attention_heads * config.head_dim + 2 * size * keys
    return 2 * size * d + max(attention, 2 * 4 * d), 4 * size * d
