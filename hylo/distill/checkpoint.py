"""Training state on disk: complete checkpoints only, the newest wins, the oldest go."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hylo.atomic import atomic_directory, remove_directory
from hylo.errors import UserError

STATE_FILE = "state.pt"
_NAME = re.compile(r"step-(\d{9})")


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending. A checkpoint being written has another name."""
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(directory: Path, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Write the state after `step` steps, in one atomic move, then drop all but the newest `keep`.

    Raises:
        UserError: the disk is full; the partial checkpoint is removed and older ones stay.
    """
    with atomic_directory(_path(directory, step)) as partial, open_state_file(partial / STATE_FILE) as file:
        torch.save(state, file)
    for old in checkpoint_steps(directory)[:-keep]:
        remove_directory(_path(directory, old))


def open_state_file(path: Path) -> BinaryIO:
    return path.open("wb")


def load_checkpoint(directory: Path, step: int) -> dict[str, Any]:
    """The state saved after `step` steps, tensors on the CPU.

    Raises:
        UserError: the file is damaged.
    """
    path = _path(directory, step) / STATE_FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"checkpoint '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    return state


def random_state() -> dict[str, Any]:
    """States of every generator that training code could draw from, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    _, key, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.array(key)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:09d}"
