"""A hybrid out of two others of the same base: some layers from the one, the rest from the other."""

from collections.abc import Sequence
from pathlib import Path

import torch

from hylo.config import HyloConfig
from hylo.errors import UserError
from hylo.model import HyloForCausalLM


def assemble(
    mla: HyloForCausalLM | str | Path, linear: HyloForCausalLM | str | Path, mla_layers: Sequence[int]
) -> HyloForCausalLM:
    """Take the layers `mla_layers` from one hybrid and all others from another; the rest is the first one's.

    Args:
        mla, linear: models or their directories, of the same base; usually pure MLA and pure linear ones.
    Raises:
        UserError: a layer is out of range or of the wrong kind there, or the two models do not fit together.
    """
    mla, linear = (_loaded(model) for model in (mla, linear))
    config = assembled_config(mla.config, linear.config, mla_layers)
    with torch.device("meta"):
        hybrid = HyloForCausalLM(config)
    state = {name: tensor for name, tensor in mla.state_dict().items() if not name.startswith("model.layers.")}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        source = mla if i in mla_layers else linear
        state |= {name: tensor for name, tensor in source.state_dict().items() if name.startswith(prefix)}
    hybrid.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return hybrid.eval()


def assembled_config(mla: HyloConfig, linear: HyloConfig, mla_layers: Sequence[int]) -> HyloConfig:
    """Configuration of `assemble`'s result, from those of its two parts.

    Raises:
        UserError: as `assemble`.
    """
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        ours, theirs = getattr(mla, name), getattr(linear, name)
        if ours != theirs:
            raise UserError(f"the two models do not fit: {name} is {ours} in the one and {theirs} in the other")
    count = mla.num_hidden_layers
    for layer in mla_layers:
        if not 0 <= layer < count:
            raise UserError(f"MLA layer {layer} is out of range: the models have layers 0 to {count - 1}")
    assert mla.mixer_types is not None
    assert linear.mixer_types is not None
    chosen = [(mla if i in mla_layers else linear).mixer_types[i] for i in range(count)]  # type: ignore[index]
    for i, mixer in enumerate(chosen):
        if (mixer == "mla") != (i in mla_layers):
            raise UserError(f"layer {i} of the {'MLA' if i in mla_layers else 'linear'} model is a {mixer} layer")
    widths = {name: value for name, value in linear.to_dict().items() if name.startswith("linear_")}
    merged = mla.to_dict() | widths | {"mixer_types": chosen}
    return HyloConfig(**{name: value for name, value in merged.items() if name != "layer_types"})


def _loaded(model: HyloForCausalLM | str | Path) -> HyloForCausalLM:
    if isinstance(model, HyloForCausalLM):
        return model
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"'{model}' is not the directory of a hybrid")
    loaded: HyloForCausalLM = HyloForCausalLM.from_pretrained(model)
    return loaded
