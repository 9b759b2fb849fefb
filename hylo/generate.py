"""`hylo generate` without the command line: a checkpoint and a prompt in, text out, piece by piece."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hylo
from hylo.errors import UserError
from hylo.inference import GREEDY, Engine, Sampling

_CHUNK = 8192
_CONTEXT = 8  # tokens before a new one that tell how it is written


class Progress:
    """Tokens a second and the time left, on a stream: in one line of a terminal, else a line every 10 seconds."""

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what, self._stream = what, sys.stderr if stream is None else stream
        self._start = self._shown = time.monotonic()
        self._in_place = self._stream.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.5 if self._in_place else 10):
            return
        self._shown = now
        rate = done / (now - self._start)
        text = f"{self._what}: {done} of {total} tokens, {rate:.0f} tokens/s, {(total - done) / rate:.0f} s left"
        begin, end = ("\r", "\x1b[K") if self._in_place else ("", "\n")
        print(f"{begin}{text}", end=end, file=self._stream, flush=True)

    def finish(self, done: int) -> None:
        """The last word: how long all of it took."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        clear = "\r\x1b[K" if self._in_place else ""  # the line that was written in place
        text = f"{self._what}: {done} tokens in {seconds:.1f} s, {done / seconds:.0f} tokens/s"
        print(f"{clear}{text}", file=self._stream, flush=True)


class Detokenizer:
    """Text of tokens as they come; a character that is not whole yet is held back."""

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._keep(context)

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        if text.endswith("�"):
            return ""
        new = text[len(self._shown) :]
        self._keep(self._ids)
        return new

    def flush(self) -> str:
        """What was held back."""
        return self._text()[len(self._shown) :]

    def _keep(self, ids: list[int]) -> None:
        self._ids = ids[-_CONTEXT:]
        self._shown = self._text()

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


def stream_text(
    model_dir: Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    sampling: Sampling = GREEDY,
    prefill_chunk_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[str]:
    """Continue `prompt` with the model and tokenizer in `model_dir`: the pieces of the new text, as they come.

    The prompt is read before this returns, with progress on standard error. A hybrid runs on `hylo.inference.Engine`;
    any other model on transformers' `generate`, and its text comes at once.

    Args:
        prefill_chunk_size: tokens of the prompt read at a time, which bounds memory; None: 8192, and all with
            transformers.
    Raises:
        UserError: no checkpoint in `model_dir`, an empty prompt, one that leaves no room in the position table, a
            number that is not positive, or too little memory.
    """
    for option, number in (("max_new_tokens", max_new_tokens), ("prefill_chunk_size", prefill_chunk_size)):
        if number is not None and number < 1:
            raise UserError(f"{option} must be at least 1, got {number}")
    if not (model_dir / "config.json").is_file():
        raise UserError(f"'{model_dir}' holds no model: there is no config.json in it")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] == 0:
        raise UserError(f"the prompt must hold at least one token, got {prompt!r}")
    limit = AutoConfig.from_pretrained(model_dir).max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise UserError(f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the model's {limit}")
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    model.to(device).eval()
    new = _by_engine if isinstance(model, hylo.HyloForCausalLM) else _by_transformers
    tokens = new(model, ids, max_new_tokens, sampling, prefill_chunk_size, seed)
    return _pieces(tokens, max_new_tokens, Detokenizer(tokenizer, ids[0, -_CONTEXT:].tolist()))


def _pieces(tokens: Iterator[int], most: int, detokenizer: Detokenizer) -> Iterator[str]:
    progress, count = Progress("new"), 0
    told = not sys.stdout.isatty()  # the text itself shows how far it is
    for count, token in enumerate(tokens, 1):
        if told:
            progress(count, most)
        yield detokenizer.push(token)
    yield detokenizer.flush()
    progress.finish(count)


def _by_engine(
    model: hylo.HyloForCausalLM, ids: Tensor, most: int, sampling: Sampling, chunk: int | None, seed: int
) -> Iterator[int]:
    engine = Engine(model, capacity=ids.shape[1] + most, chunk=_CHUNK if chunk is None else chunk)
    progress = Progress("prompt")
    found = engine.stream([ids[0]], max_new_tokens=most, sampling=sampling, seed=seed, progress=progress)
    progress.finish(ids.shape[1])
    return (token for (token,) in found if token is not None)


def _by_transformers(
    model: Any, ids: Tensor, most: int, sampling: Sampling, chunk: int | None, seed: int
) -> Iterator[int]:
    torch.manual_seed(seed)
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p or 1.0}
    settings: dict[str, Any] = {"do_sample": True, **drawn} if sampling.temperature > 0 else {"do_sample": False}
    ids = ids.to(model.device)
    settings["pad_token_id"] = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, prefill_chunk_size=chunk, **settings
    )
    yield from found[0, ids.shape[1] :].tolist()
