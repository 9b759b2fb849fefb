"""The table printed before each stage: which parts train, how large they are, in which dtype."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.table import Table
from torch import nn

from hylo.distill.layers import decoder_layers, mixer_of
from hylo.errors import UserError


@dataclass
class Group:
    """Parameters of one part of the model; counts in elements."""

    tensors: int = 0
    parameters: int = 0
    trainable: int = 0
    dtypes: set[str] = field(default_factory=set)


def choose_trainable(model: nn.Module, trainable: str | Sequence[str]) -> None:
    """Freeze all parameters but those that one of the regular expressions is found in ("all": none frozen).

    Raises:
        UserError: an expression is malformed or is found in no parameter's name.
    """
    names = [name for name, _ in model.named_parameters()]
    patterns = [""] if isinstance(trainable, str) else list(trainable)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"trainable pattern '{pattern}' is not a regular expression: {error}") from None
        if not found:
            raise UserError(f"trainable pattern '{pattern}' is found in no parameter name")
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def parameter_groups(model: nn.Module) -> dict[str, Group]:
    """Parameters by part of the model: embedding, each kind of mixer, MLPs, norms, head."""
    kinds = {i: type(mixer_of(layer)).__name__ for i, layer in enumerate(decoder_layers(model))}
    groups: dict[str, Group] = {}
    for name, parameter in model.named_parameters():
        group = groups.setdefault(_part(name, kinds), Group())
        group.tensors += 1
        group.parameters += parameter.numel()
        group.trainable += parameter.numel() if parameter.requires_grad else 0
        group.dtypes.add(str(parameter.dtype).removeprefix("torch."))
    return groups


def parameter_table(title: str, groups: dict[str, Group]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    for column in ("tensors", "parameters", "trainable"):
        table.add_column(column, justify="right")
    table.add_column("dtype")
    for name, group in [*groups.items(), ("total", _total(groups.values()))]:
        if name == "total":
            table.add_section()
        counts = (group.tensors, group.parameters, group.trainable)
        table.add_row(name, *(f"{count:,}" for count in counts), " ".join(sorted(group.dtypes)))
    return table


def _total(groups: Iterable[Group]) -> Group:
    total = Group()
    for group in groups:
        total.tensors += group.tensors
        total.parameters += group.parameters
        total.trainable += group.trainable
        total.dtypes |= group.dtypes
    return total


def _part(name: str, mixers: dict[int, str]) -> str:
    match = re.search(r"layers\.(\d+)\.(\w+)", name)
    if match is None:
        return name.removeprefix("model.").removesuffix(".weight")
    if match[2] in ("mixer", "self_attn"):
        return f"mixer {mixers[int(match[1])]}"
    return "layer norms" if "layernorm" in match[2] else match[2]
