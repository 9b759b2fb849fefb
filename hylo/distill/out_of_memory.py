"""A GPU that has too little memory for a stage, told in one sentence that names what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hylo.distill.engine import last_step
from hylo.distill.recipe import CeStage, IldStage, KlStage
from hylo.errors import UserError

_TILE = 4096  # tokens of an MLP tile to begin with


@contextmanager
def enough_memory(stage: IldStage | KlStage | CeStage, checkpoints: Path) -> Iterator[None]:
    """Run a stage; a failed allocation of a GPU becomes a UserError. Checkpoints stay as they are.

    Raises:
        UserError: the GPU's memory is too small; says by how much, what to change, and where `--resume` goes on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        wanted = str(error).partition(" GPU ")[0].strip().rstrip(".")  # without the page on what the GPU holds
        raise UserError(
            f"stage '{stage.name}' needs more memory than the GPU has ({wanted}): {_advice(stage)}; "
            f"`hylo memory` tells what each saves, and --resume goes on from step {last_step(checkpoints)} of the stage"
        ) from error


def _advice(stage: IldStage | KlStage | CeStage) -> str:
    """What is left to set, the cheapest first."""
    found = []
    if not isinstance(stage, IldStage) and stage.activation_checkpointing is not True:
        found.append("set activation_checkpointing" + " to true" * bool(stage.activation_checkpointing))
    if stage.batch_size > 1:
        each, times = stage.batch_size // 2, stage.gradient_accumulation * 2
        found.append(f"set batch_size to {each} and gradient_accumulation to {times}")
    if stage.mlp_tile_tokens is None:
        found.append(f"set mlp_tile_tokens to {_TILE}")
    return " or ".join([*found, "share the run between GPUs with torchrun"])
