"""Packed token files, and batches out of them as a pure function of (seed, step).

Documents are joined with BOS and EOS between them and cut into constant lengths, with no cross-document masking.
Source: recipe of arXiv 2604.24715 (TRL-style packing).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hylo.atomic import atomic_directory
from hylo.distill.corpus import corpus_identity, documents
from hylo.distill.processes import from_first, on_first
from hylo.distill.recipe import Data
from hylo.errors import UserError

FORMAT = 1
DOCUMENTS_AT_ONCE = 64


class Packed(NamedTuple):
    """All tokens, [N] uint16 or uint32, memory-mapped read-only, and the hash of what they were made from."""

    tokens: np.ndarray
    key: str


def pack(data: Data, tokenizer: PreTrainedTokenizerBase) -> Packed:
    """Tokenise the sources once; later calls with the same content, tokenizer and settings map the same file.

    Of several processes the first one does it, and all map the file.

    Raises:
        UserError: the sources are unusable, hold no text, or the disk is full (the partial file is removed).
    """
    key = from_first(on_first(lambda: _packed_key(data, tokenizer)))
    assert key is not None
    return Packed(np.memmap(_cache_root(data) / key / "tokens.bin", dtype=_dtype(tokenizer), mode="r"), key)


def open_token_file(path: Path) -> BinaryIO:
    return path.open("wb")


class Batches:
    """The batches of one stage: batch(step) depends on nothing but the arguments given here and the step.

    The text is cut into sequences of `length`; one permutation per seed picks the fraction that is used, and a
    fresh one each epoch orders it. So a run's position in the data is its step number.

    Args:
        tokens: [N] unsigned integers.
        length: tokens in a sequence.
        sequences_per_step: sequences in one optimiser step.
        fraction: share of the sequences that is used, in (0, 1].
    Raises:
        UserError: there is not one whole sequence.
    """

    def __init__(
        self, tokens: np.ndarray, *, length: int, sequences_per_step: int, seed: int, fraction: float = 1.0
    ) -> None:
        count = len(tokens) // length
        if count == 0:
            raise UserError(f"the data hold {len(tokens)} tokens, fewer than one sequence of {length}")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.sequences_per_step = sequences_per_step
        used = max(1, int(count * fraction))
        self.used = np.sort(np.random.default_rng([seed, 0]).permutation(count)[:used])
        self._epoch: tuple[int, np.ndarray] = (-1, self.used)

    @property
    def sequences(self) -> int:
        """Sequences in one epoch."""
        return len(self.used)

    def batch(self, step: int) -> Tensor:
        """Tokens of optimiser step `step` (from 0): [sequences_per_step, length] int64."""
        first = step * self.sequences_per_step
        rows = [self._sequence(first + i) for i in range(self.sequences_per_step)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _sequence(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, self.sequences)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self.seed, 1, epoch]).permutation(self.used))
        start = int(self._epoch[1][index]) * self.length
        return self.tokens[start : start + self.length]


def separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids put before and after a document: BOS where the tokenizer has one, EOS where it has one.

    Raises:
        UserError: it has neither.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise UserError(f"tokenizer '{tokenizer.name_or_path}' has neither a BOS nor an EOS token")
    return [] if bos is None else [bos], [] if eos is None else [eos]


def _packed_key(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name of the packed tokens, which are there when this returns."""
    key = _cache_key(data, tokenizer)
    target, dtype = _cache_root(data) / key, _dtype(tokenizer)
    if not target.exists():
        with atomic_directory(target) as partial:
            with open_token_file(partial / "tokens.bin") as file:
                count = _write_tokens(file, documents(data, tokenizer), tokenizer, dtype)
            if count == 0:
                raise UserError("the data sources hold no text")
            (partial / "meta.json").write_text(json.dumps({"tokens": count, "dtype": dtype.name}))
    return key


def _dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)


def _write_tokens(
    file: BinaryIO, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]
) -> int:
    before, after = separators(tokenizer)
    count = 0
    for group in _groups(texts, DOCUMENTS_AT_ONCE):
        for ids in tokenizer(group, add_special_tokens=False)["input_ids"]:
            # A chat template may already have written the BOS and EOS.
            head = [] if ids[: len(before)] == before else before
            tail = [] if after and ids[-1:] == after else after
            packed = np.array([*head, *ids, *tail], dtype=dtype)
            file.write(packed.tobytes())
            count += len(packed)
    return count


def _groups(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while group := list(islice(iterator, size)):
        yield group


def _cache_root(data: Data) -> Path:
    if data.cache_dir is not None:
        return Path(data.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hylo" / "tokens"


def _cache_key(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    identity = [FORMAT, corpus_identity(data), _tokenizer_identity(tokenizer), separators(tokenizer)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [type(tokenizer).__name__, rules, tokenizer.chat_template]
