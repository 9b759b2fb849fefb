"""What training needs to know about a causal LM's inside: its layers, their mixers, final states and head.

Works on every model laid out as transformers lays out Llama and Qwen (`model.embed_tokens`, `model.layers`,
`model.norm`, `lm_head`), HyLo's own among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class LayerStates(NamedTuple):
    """One layer seen from outside, each [B, T, D]; `output` of the last layer is after the final norm."""

    entered: Tensor
    mixed: Tensor
    output: Tensor


def mixer_of(layer: nn.Module) -> nn.Module:
    """The token mixer: `mixer` in HyLo's layers, `self_attn` in a Transformer's."""
    found = getattr(layer, "mixer", None)
    return found if found is not None else layer.get_submodule("self_attn")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule("model.layers").children())


def position_embeddings(model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) for positions 0..T-1 in the form the model's layers take."""
    inner: Any = model.get_submodule("model")
    positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    if hasattr(inner, "rotary"):
        cos, sin = inner.rotary(positions, hidden.dtype)
    else:
        cos, sin = inner.rotary_emb(hidden, positions)
    return cos, sin


def run_layer(model: nn.Module, index: int, entered: Tensor, rotation: tuple[Tensor, Tensor]) -> LayerStates:
    """Run layer `index` alone on `entered`; the last layer is followed by the final norm.

    A mask of None means causal to the layers: models are loaded with SDPA for that reason.
    """
    layers = decoder_layers(model)
    mixed: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        mixed.append(output[0] if isinstance(output, tuple) else output)

    handle = mixer_of(layers[index]).register_forward_hook(keep)
    try:
        output = layers[index](entered, position_embeddings=rotation, attention_mask=None)
    finally:
        handle.remove()
    normed = model.get_submodule("model.norm")(output) if index == len(layers) - 1 else output
    return LayerStates(entered, mixed[0], normed)


@torch.no_grad()
def layer_states(model: nn.Module, input_ids: Tensor) -> Iterator[LayerStates]:
    """Run a model layer by layer, without gradient, and yield each layer's states; only one layer's are alive."""
    embedding = model.get_submodule("model.embed_tokens")
    hidden: Tensor = inside(model, lambda: embedding(input_ids))
    rotation = position_embeddings(model, hidden)
    for index in range(len(decoder_layers(model))):
        states = run_layer(model, index, hidden, rotation)
        yield states
        hidden = states.output


def final_hidden(model: nn.Module, input_ids: Tensor) -> Tensor:
    """Hidden states after the final norm, [B, T, D], with no logits made; to be called `inside` the model."""
    inner: Any = model.get_submodule("model")
    hidden: Tensor = inner(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def head_weight(model: nn.Module) -> Tensor:
    """The LM head [V, D]; to be asked for `inside` the model."""
    head: Any = model.get_submodule("lm_head")
    weight: Tensor = head.weight
    return weight


def inside(model: nn.Module, work: Callable[[], T]) -> T:
    """Run `work` with the model's embedding and head whole, if it is cut up (shards.py); backward may follow later."""
    run: Callable[[Callable[[], T]], T] | None = getattr(model, "run_inside", None)
    return work() if run is None else run(work)
