"""Directories that appear whole or not at all, and a full disk told in one sentence."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hylo.errors import UserError

NO_SPACE = "No space left on device"


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `target`; on success flush it to disk and rename it to `target`.

    A kill leaves at most a hidden `.NAME.PID.partial`, which the next call beside it removes.

    Raises:
        UserError: the disk is full; what had been written is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    _remove_leftovers(target.parent, partial)
    partial.mkdir()
    try:
        with full_disk_is_a_user_error(target):
            yield partial
            _flush(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_entry(target.parent)


@contextmanager
def full_disk_is_a_user_error(target: Path) -> Iterator[None]:
    """Turn "no space left" into a UserError that names `target`.

    torch and safetensors report it as their own error types, with the system's words inside.
    """
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or NO_SPACE in str(error):
            raise UserError(f"no space left on the disk while writing '{target}'") from error
        raise


def remove_directory(path: Path) -> None:
    """Remove a directory so that a kill in the middle never leaves half of it under its name."""
    hidden = path.parent / f".{path.name}.{os.getpid()}.partial"
    path.rename(hidden)
    shutil.rmtree(hidden)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a file by new text in one step."""
    partial = path.parent / f".{path.name}.partial"
    with full_disk_is_a_user_error(path), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _remove_leftovers(directory: Path, ours: Path) -> None:
    """Remove what dead processes left, and what one of our own number left under the name that we want."""
    for path in directory.glob(".*.partial"):
        owner = path.name.split(".")[-2]
        if path.is_dir() and owner.isdigit() and (path == ours or not _alive(int(owner))):
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process
    return True


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
