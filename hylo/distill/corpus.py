"""Documents of a recipe's sources, one by one, with their identity for the token cache."""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hylo.distill.recall import recall_documents
from hylo.distill.recipe import Data, Source
from hylo.errors import UserError
from hylo.text import file_hash, read_utf8


def documents(data: Data, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield every document in the order of the sources, files sorted by path, empty ones left out.

    Raises:
        UserError: a source is missing, a file is not UTF-8, a line is not JSON, a field has another type, or a text
            is too short for the recall documents that are to be made of it.
    """
    for source in data.sources:
        found = (document for document in _documents(source, data.exclude, tokenizer) if document)
        yield from found if source.recall is None else recall_documents(found, source.recall)


def corpus_identity(data: Data) -> list[Any]:
    """What decides the documents: every source's settings and a hash of its content."""
    identity: list[Any] = []
    for source in data.sources:
        unsaid = {"recall"} if source.recall is None else set()  # so that a source without it is what it was before
        settings = source.model_dump(exclude={"text", "jsonl"} | unsaid)
        if source.dataset is not None:
            identity.append([settings, _load_dataset(source)._fingerprint])
        else:
            identity.append([settings, [file_hash(path, "text file") for path in source_files(source, data.exclude)]])
    return identity


def source_files(source: Source, exclude: list[str]) -> list[Path]:
    """Files of a text or JSONL source, sorted; `exclude` holds shell patterns matched against the whole path.

    Raises:
        UserError: nothing matches.
    """
    pattern = source.text or source.jsonl or ""
    found = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
    kept = [
        Path(path)
        for path in sorted(found)
        if Path(path).is_file() and not any(fnmatch.fnmatch(path, one) for one in exclude)
    ]
    if not kept:
        raise UserError(f"data source '{pattern}' matches no file")
    return kept


def _documents(source: Source, exclude: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    if source.dataset is not None:
        rows = _load_dataset(source)
        if source.field not in rows.column_names:
            raise UserError(
                f"dataset '{source.dataset}' has no field '{source.field}', only {', '.join(rows.column_names)}"
            )
        for index, value in enumerate(rows[source.field]):
            yield _as_text(value, tokenizer, f"dataset '{source.dataset}', row {index}, field '{source.field}'")
        return
    for path in source_files(source, exclude):
        if source.jsonl is not None:
            yield from _jsonl(path, source.field, tokenizer)
        else:
            text = read_utf8(path)
            yield from text.split(source.separator) if source.separator else [text]


def _jsonl(path: Path, field: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, line in enumerate(_utf8_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"'{path}' line {number} is not JSON: {error.msg}") from None
        if not isinstance(row, dict) or field not in row:
            raise UserError(f"'{path}' line {number} has no field '{field}'")
        yield _as_text(row[field], tokenizer, f"'{path}' line {number}, field '{field}'")


def _utf8_lines(path: Path) -> Iterator[str]:
    """Lines of a file that may be larger than memory; the offset of a bad byte counts from the file's start."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad, where = line[error.start], offset + error.start
                raise UserError(f"text file '{path}' is not UTF-8: byte 0x{bad:02x} at offset {where}") from None
            offset += len(line)


def _as_text(value: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if isinstance(value, str):
        return value
    is_chat = isinstance(value, list) and all(isinstance(turn, dict) and "role" in turn for turn in value)
    if not is_chat:
        raise UserError(f"{where} is neither text nor a chat: {str(value)[:60]!r}")
    if tokenizer.chat_template is None:
        raise UserError(f"{where} is a chat, but the tokenizer '{tokenizer.name_or_path}' has no chat template")
    return str(tokenizer.apply_chat_template(value, tokenize=False))


def _load_dataset(source: Source) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"data source '{source.dataset}' needs the package 'datasets': pip install 'hylo[data]'"
        ) from None
    try:
        return datasets.load_dataset(source.dataset, source.subset, split=source.split)
    except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"cannot load dataset '{source.dataset}': {error}") from None
