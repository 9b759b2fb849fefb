"""Training state on disk: complete checkpoints only, the newest wins, the oldest go.

A checkpoint is a directory: tensors in torch.distributed.checkpoint's format, of which each process writes its share
and any number of processes reads what it needs, and `progress.pt` with all that is no tensor of the model's.
"""

from __future__ import annotations

import pickle
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from hylo.atomic import atomic_directory, full_disk_is_a_user_error, remove_directory
from hylo.distill.processes import from_first, of_all, on_first, process_number
from hylo.errors import UserError

PROGRESS_FILE = "progress.pt"
_NAME = re.compile(r"step-(\d{9})")
_READING = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending. A checkpoint being written has another name."""
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(
    directory: Path, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], *, keep: int
) -> None:
    """Write the state after `step` steps, in one atomic move, then drop all but the newest `keep`.

    Every process calls it, and `load_tensors` too.

    Args:
        tensors: by name; of a sharded one each process has its share, of any other all have the same.
        progress: plain values and tensors; the first process's are written.
    Raises:
        UserError: the disk is full; the partial checkpoint is removed and older ones stay.
    """
    target = _path(directory, step)
    with ExitStack() as stack:  # holds the directory in the first process and nothing in the others
        partial = from_first(on_first(lambda: stack.enter_context(atomic_directory(target))))
        assert partial is not None
        with full_disk_is_a_user_error(target), _dcp_errors():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial))
        on_first(lambda: _write_progress(partial / PROGRESS_FILE, progress))
        on_first(stack.close)
    on_first(lambda: _drop_old(directory, keep))


def load_progress(directory: Path, step: int) -> dict[str, Any]:
    """The `progress` saved after `step` steps, tensors on the CPU.

    Raises:
        UserError: the file is damaged.
    """
    path = _path(directory, step) / PROGRESS_FILE
    with _damage(path):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def saved_names(directory: Path, step: int) -> set[str]:
    """Names of the tensors saved after `step` steps.

    Raises:
        UserError: the list of them is damaged.
    """
    path = _path(directory, step)
    with _damage(path):
        return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def load_tensors(directory: Path, step: int, tensors: dict[str, Tensor]) -> None:
    """Read the tensors saved after `step` steps into `tensors`, whoever's shares they were.

    Raises:
        UserError: a file is damaged, or a tensor is missing or has another shape.
    """
    path = _path(directory, step)
    with _damage(path), _dcp_errors():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path))


def random_states() -> list[dict[str, Any]]:
    """States of every generator that training code could draw from, of each process; tensors and plain values."""
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    _, key, *rest = legacy
    own = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(key.astype(np.int64)), *rest],  # a uint32 tensor cannot be pickled
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    return of_all(own)


def restore_random_state(states: list[dict[str, Any]], seed: int) -> None:
    """Set this process's generators to what its own were, or by `seed` where there were fewer processes then."""
    if process_number() >= len(states):
        seed_everything(seed)
        return
    state = states[process_number()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, *rest = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed every generator, each process's differently: dropout must not repeat in another one's sequences."""
    seed += process_number()
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def open_progress_file(path: Path) -> BinaryIO:
    return path.open("wb")


def _write_progress(path: Path, progress: dict[str, Any]) -> None:
    with open_progress_file(path) as file:
        torch.save(progress, file)


def _drop_old(directory: Path, keep: int) -> None:
    for old in checkpoint_steps(directory)[:-keep]:
        remove_directory(_path(directory, old))


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:09d}"


@contextmanager
def _dcp_errors() -> Iterator[None]:
    """Raise what went wrong in some process, of which DCP tells all in an exception of its own."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process, as meant
            yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _READING as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint '{path}' cannot be read: {reason}") from error
