"""The quickstart's text: the standard library of the running Python, split into training and held-out files.

A short list of modules, the same for every Python from 3.11 to 3.13, is held out from tokenizer, teacher and
distillation alike. Tests, generated tables and platform build records are left out of both parts.
"""

import json
import lzma
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

from hylo.errors import UserError

HELD_OUT = (
    "asyncio/streams.py",
    "calendar.py",
    "colorsys.py",
    "configparser.py",
    "csv.py",
    "email/generator.py",
    "fileinput.py",
    "fractions.py",
    "ftplib.py",
    "graphlib.py",
    "html/parser.py",
    "logging/config.py",
    "netrc.py",
    "plistlib.py",
    "pprint.py",
    "selectors.py",
    "shlex.py",
    "tempfile.py",
    "textwrap.py",
    "urllib/robotparser.py",
    "zoneinfo/_zoneinfo.py",
)
"""Modules no part of the quickstart ever trains on: in every Python from 3.11 to 3.13, outside `test/`, of many
kinds, and with no near-duplicate elsewhere in the library (docs/quickstart.md has the measurement)."""

_SKIPPED_DIRS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"})
_SKIPPED_FILES = frozenset({"html/entities.py"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
_GENERATED_MARK = "gencodec.py"  # named in the docstring of every generated character map of `encodings`


@dataclass(frozen=True)
class Document:
    """One source file: its path inside the library, with forward slashes, and its text."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8, in bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, each sorted by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the training text."""
        return sum(d.num_bytes for d in self.train)

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return sum(d.num_bytes for d in self.held_out)


def standard_library() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def load_corpus(root: Path | None = None) -> Corpus:
    """Reads the standard library below `root` (default: the running interpreter's).

    Raises:
        UserError: a held-out module is missing, so `root` is no complete library of Python 3.11 to 3.13.
    """
    root = standard_library() if root is None else root
    documents = {name: text for name in _module_names(root) if (text := _read(root / name)) is not None}
    missing = [name for name in HELD_OUT if name not in documents]
    if missing:
        raise UserError(
            f"{str(root)!r} is no complete Python 3.11 to 3.13 standard library: it lacks {', '.join(missing)}"
        )
    held_out = tuple(Document(name, documents[name]) for name in HELD_OUT)
    train = tuple(Document(name, text) for name, text in sorted(documents.items()) if name not in HELD_OUT)
    return Corpus(train=train, held_out=held_out)


def _module_names(root: Path) -> list[str]:
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in names if not _is_skipped(name))


def _is_skipped(name: str) -> bool:
    return not _SKIPPED_DIRS.isdisjoint(name.split("/")) or name in _SKIPPED_FILES or name.startswith(_SKIPPED_PREFIXES)


def _read(path: Path) -> str | None:
    """The text of a source file, decoded as Python decodes it; None for a generated table."""
    with tokenize.open(path) as file:
        text = file.read()
    return None if _GENERATED_MARK in text[:1000] else text


def write_jsonl(documents: tuple[Document, ...], path: Path) -> None:
    """Writes one `{"name", "text"}` object per line, in the order given."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"name": d.name, "text": d.text}) + "\n" for d in documents)


def xz_bits_per_byte(documents: tuple[Document, ...]) -> float:
    """Size under `xz -9e` of the concatenated texts, in bits for each byte of text."""
    raw = "".join(d.text for d in documents).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def xz_bits_per_byte_after(context: tuple[Document, ...], documents: tuple[Document, ...]) -> float:
    """What `documents` add to the size of `context` under `xz -9e`, in bits for each byte of `documents`.

    A harder mark than `xz_bits_per_byte`: the compressor has seen the training text as well.
    """
    prefix = "".join(d.text for d in context).encode()
    raw = "".join(d.text for d in documents).encode()
    preset = 9 | lzma.PRESET_EXTREME
    grown = len(lzma.compress(prefix + raw, preset=preset)) - len(lzma.compress(prefix, preset=preset))
    return 8 * grown / len(raw)
