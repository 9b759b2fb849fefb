"""The text of the demonstration: an archive of books, unpacked into a part to train on and a part held out."""

from __future__ import annotations

import json
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from hylo.atomic import atomic_directory
from hylo.errors import UserError
from hylo.extension.recipe import Text
from hylo.text import file_hash, read_utf8

PARTS = ("train", "held_out")
_SPLIT = "split.json"


class Books(NamedTuple):
    """Files of both parts, sorted by name."""

    train: list[Path]
    held_out: list[Path]

    def held_out_text(self) -> str:
        return "\n\n".join(read_utf8(path) for path in self.held_out)


def unpack(text: Text) -> Books:
    """The books on disk, unpacked if they are not yet.

    Raises:
        UserError: the archive cannot be read, holds no file for one of the parts, or `text.directory` has another
            archive's files or another split.
    """
    directory, archive = Path(text.directory), Path(text.archive)
    split = {"archive": file_hash(archive, "archive"), "held_out": text.held_out}
    if not directory.exists():
        with atomic_directory(directory) as partial:
            _extract(archive, text.held_out, partial)
            (partial / _SPLIT).write_text(json.dumps(split), encoding="utf-8")
    recorded = directory / _SPLIT
    if not recorded.is_file() or json.loads(recorded.read_text(encoding="utf-8")) != split:
        raise UserError(f"directory '{directory}' has another text than '{archive}' with held_out {text.held_out}")
    return Books(*(sorted((directory / part).iterdir()) for part in PARTS))


def _extract(archive: Path, held_out: list[str], directory: Path) -> None:
    """Files go by their last name alone, wherever in the archive they lie."""
    for part in PARTS:
        (directory / part).mkdir()
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    name = Path(member.name).name
                    part = PARTS[any(fnmatch(name, pattern) for pattern in held_out)]
                    (directory / part / name).write_bytes(content.read())
    except tarfile.TarError as error:
        raise UserError(f"'{archive}' is not a whole tar archive: {error}") from None
    for part in PARTS:
        if not any((directory / part).iterdir()):
            raise UserError(f"'{archive}' with held_out {held_out} leaves no file for '{part}'")
