"""python -m bench.inference: time to the first token, time of each further one and peak memory, at true dims.

Random bf16 weights. The published hybrids run on `hylo.inference.Engine`, Llama of the same dims on transformers:
static cache, SDPA, prefill in chunks, its decode step eager or compiled to CUDA graphs. Each is checked against one
pass of its model before the clock starts. Contexts are read, or random numbers in the caches, and labelled so. Before
a prompt's clock starts, one with blocks of all its shapes is read: it makes kernels, plans of attention and graphs.
"""

import argparse
import gc
import inspect
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import hylo
from bench import record, timing
from bench.flops import forward_flop
from bench.models import on_device
from hylo.errors import UserError
from hylo.inference import Engine
from hylo_ops import mla_prefill
from hylo_ops.testing import relative_error

_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
DENSE: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "Llama-3.2-3B": _LLAMA
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
DEFAULT_MODELS = ["Llama-4MLA12GDN", "Llama-14MLA14GDN", "Llama-6MLA22M2", *DENSE]
# Of bf16 logits against another order of the same sums: 0.05 at 28 layers. A wrong cache gives about 1.
_LARGEST_ERROR = 0.1
_MOST_ROUNDS, _SECONDS = 5, 1.0  # of a row: until there are so many, or they took so long
_STEP = 8192  # tokens to which the longest cache that fits is found
_SLICE: int = inspect.signature(mla_prefill).parameters["slice_tokens"].default
_PRINTED = {
    "ttft_s": "ttft {:.3f} s",
    "tpot_ms": "tpot {:.3f} ms",
    "step_tb_per_second": "{:.2f} TB/s",
    "peak_gib": "{:.2f} GiB",
    "failed": "{}",
}


class Runner(Protocol):
    """A model with caches for `batch` sequences."""

    cache_bytes: int
    chunk: int  # tokens read at a time
    period: int  # tokens after which blocks of the same shapes are read again

    def prefill(self, ids: Tensor) -> Tensor:
        """Reads ids [B, T]; logits [B, vocabulary] of the last token."""

    def fill(self, length: int) -> None:
        """Random numbers in place of `length` tokens."""

    def tokens(self, count: int) -> Iterator[list[int]]:
        """So many tokens of each sequence, on the host one after the other; the likeliest ones."""


class Hybrid:
    """On the engine of this library."""

    def __init__(self, model: hylo.HyloForCausalLM, batch: int, capacity: int, chunk: int) -> None:
        self._batch, self.chunk, self.period = batch, chunk, math.lcm(chunk, _SLICE)
        self._engine = Engine(model, batch=batch, capacity=capacity, chunk=chunk)
        self.cache_bytes = self._engine.pools.row_bytes + self._engine.pools.state_bytes

    def prefill(self, ids: Tensor) -> Tensor:
        self._engine.prefill(list(ids))
        return self._engine.logits

    def fill(self, length: int) -> None:
        self._engine.fill(length, sequences=self._batch)

    def tokens(self, count: int) -> Iterator[list[Any]]:
        return (list(step) for step in self._engine.decode(count, end=()))


class Dense:
    """On transformers, with its static cache."""

    def __init__(
        self, model: LlamaForCausalLM, batch: int, capacity: int, chunk: int, *, compiled: bool = False
    ) -> None:
        self._model, self.chunk, self.period = model, chunk, chunk
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._step: Callable[..., Any] = model
        if compiled:
            self._step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self._logits = self._forward(model, torch.zeros(batch, 1, dtype=torch.long, device=model.device))
        self.cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    @torch.no_grad()
    def _forward(self, model: Callable[..., Any], ids: Tensor) -> Tensor:
        found = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1].clone()  # a compiled model's results are overwritten by its next call

    def prefill(self, ids: Tensor) -> Tensor:
        self._cache.reset()
        for piece in ids.split(self.chunk, dim=1):
            self._logits = self._forward(self._model, piece.to(self._model.device))
        return self._logits

    @torch.no_grad()
    def fill(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(length)

    def tokens(self, count: int) -> Iterator[list[int]]:
        """As in the engine, the next step is on its way before a token is read."""
        for i in range(count):
            token = self._logits.argmax(-1)
            if i + 1 < count:
                self._logits = self._forward(self._step, token[:, None])
            yield token.tolist()


def build(name: str, device: torch.device) -> hylo.HyloForCausalLM | LlamaForCausalLM:
    """The model of a published layout, or Llama by the name of its dims."""
    if name in DENSE:
        config = LlamaConfig(**DENSE[name], rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        config._attn_implementation = "sdpa"
        model = on_device(partial(LlamaForCausalLM, config), device)
    else:
        model = on_device(partial(hylo.HyloForCausalLM, hylo.published_variants(65536)[name]), device)
    return model.eval()


def check(model: torch.nn.Module, options: argparse.Namespace, chunk: int) -> float:
    """Error of the logits that a runner gives, in two chunks, against one pass. Fails if they are not this model's."""
    ids = prompt(model, 1, chunk + 16)
    with torch.no_grad():
        expected = model(ids.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1).logits[:, -1]
    error = relative_error(runner_of(model, options, chunk + 16, batch=1).prefill(ids), expected)
    assert error <= _LARGEST_ERROR, f"logits err by {error:.3f} of one pass"
    return error


def prompt(model: torch.nn.Module, batch: int, length: int) -> Tensor:
    """[B, T] on the host."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def measure(runner: Runner, ids: Tensor, length: int, new: int, filled: bool) -> dict[str, Any]:
    """Seconds to the first of `new` tokens and for each further one, and the peak of memory, the model's included.

    What takes no time is measured in several rounds, and the medians count.

    Args:
        ids: [B, T >= length], what is read unless `filled`.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rounds: list[tuple[float, float]] = []
    while len(rounds) < _MOST_ROUNDS and sum(map(sum, rounds)) < _SECONDS:
        rounds.append(one_round(runner, ids[:, :length], length, new, filled))
    first, further = (statistics.median(column) for column in zip(*rounds, strict=True))
    each = further / (new - 1)
    return {
        "length": length,
        "context": "filled" if filled else "read",
        "new_tokens": new,
        "rounds": len(rounds),
        "ttft_s": None if filled else first,
        "tpot_ms": 1000 * each,
        "tokens_per_second": len(ids) / each,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }


def one_round(runner: Runner, ids: Tensor, length: int, new: int, filled: bool) -> tuple[float, float]:
    """Seconds to the first of `new` tokens, with what comes before it, and from there to the last."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    if filled:
        runner.fill(length)
    else:
        runner.prefill(ids)
    times = [time.perf_counter() for _ in runner.tokens(new)]
    return times[0] - begin, times[-1] - times[0]


def prefill_flop(config: Any, length: int) -> float:
    """FLOP of reading `length` tokens, with logits of the last one."""
    return forward_flop(config, length) + 2.0 * config.hidden_size * config.vocab_size


def step_bytes(model: Any, runner: Runner, capacity: int, length: int) -> float:
    """Bytes that a decode step cannot do without: weights, rows so far, states there and back."""
    tied = model.config.tie_word_embeddings
    embeddings = 0 if tied else model.get_input_embeddings().weight.nbytes
    weights = sum(parameter.nbytes for parameter in model.parameters()) - embeddings
    if isinstance(runner, Hybrid):
        pools = runner._engine.pools
        return weights + pools.row_bytes * length / capacity + 2 * pools.state_bytes
    return weights + runner.cache_bytes * length / capacity


def runner_of(
    model: Any, options: argparse.Namespace, capacity: int, batch: int | None = None, compiled: bool = False
) -> Runner:
    batch = options.batch if batch is None else batch
    if isinstance(model, hylo.HyloForCausalLM):
        return Hybrid(model, batch, capacity, options.chunk)
    return Dense(model, batch, capacity, options.llama_chunk, compiled=compiled)


def rows_of(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Each length in a cache made for it; what does not fit gives a row that says so."""
    model = build(name, device)
    chunk = options.llama_chunk if name in DENSE else options.chunk
    shared = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": options.batch,
        "chunk": chunk,
        "compiled": name in DENSE and options.compile,
        "check_error": check(model, options, chunk),
    }
    for filled, lengths in ((False, options.lengths), (True, options.fill)):
        for length in lengths:
            _release()
            yield shared | row_of(model, options, length, filled)
    if options.longest:
        yield shared | {"context": "longest cache that fits", "length": longest(partial(_fits, model, options))}


def row_of(model: Any, options: argparse.Namespace, length: int, filled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"length": length, "context": "filled" if filled else "read"}
    capacity, ids = length + options.new, prompt(model, options.batch, length)
    try:
        runner = runner_of(model, options, capacity, compiled=options.compile)
        # a first time for kernels, compilers and graphs
        if filled:
            runner.fill(length)
        else:
            runner.prefill(ids[:, : opening(length, runner.chunk, runner.period)])
        for _ in runner.tokens(min(4, options.new)):
            pass
        row |= measure(runner, ids, length, options.new, filled)
    except (torch.OutOfMemoryError, UserError) as error:
        return row | {"failed": first_sentence(error)}
    row |= {"cache_gib": runner.cache_bytes / 2**30, "prefill_flop": options.batch * prefill_flop(model.config, length)}
    if not filled:
        row["prefill_tflops"] = row["prefill_flop"] / row["ttft_s"] / 1e12
    row["step_bytes"] = step_bytes(model, runner, capacity, length)
    row["step_tb_per_second"] = row["step_bytes"] / row["tpot_ms"] / 1e9
    return row


def first_sentence(error: Exception) -> str:
    """Without the page of advice that follows in CUDA's messages."""
    return re.split(r"(?<=\.)\s|\n", str(error), maxsplit=1)[0]


def opening(length: int, chunk: int, period: int) -> int:
    """Tokens of a prompt with blocks of all shapes that one of `length` has: as long, or shorter by whole periods.

    A chunk's shapes are how many tokens it has, and how many more than whole slices stand before it. So what is read
    has a chunk with a whole slice before it, and ends as `length` does.
    """
    return min(length, period + chunk + (length - chunk) % period)


def longest(fits: Callable[[int], bool], step: int = _STEP) -> int:
    """The greatest multiple of `step` that fits, by doubling and halving; 0 if none does."""
    most, least = step, 0
    while fits(most):
        least, most = most, 2 * most
    while most - least > step:
        middle = (most + least) // 2 // step * step
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def _fits(model: Any, options: argparse.Namespace, capacity: int) -> bool:
    """Whether the caches can be allocated, two chunks be read beside them, and a token follow."""
    _release()
    try:
        runner = runner_of(model, options, capacity)
        runner.prefill(prompt(model, options.batch, min(2 * runner.chunk, capacity - 2)))
        for _ in runner.tokens(2):
            pass
    except (torch.OutOfMemoryError, UserError):
        return False
    return True


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.inference", description=__doc__)
    known = [*hylo.published_variants(), *DENSE]
    parser.add_argument("--models", nargs="+", default=DEFAULT_MODELS, choices=known, metavar="MODEL")
    parser.add_argument("--lengths", nargs="*", type=int, default=[8192, 32768], help="tokens of prompts that are read")
    parser.add_argument("--fill", nargs="*", type=int, default=[], help="tokens of contexts that are filled")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--new", type=int, default=64, help="tokens of each sequence, at least 2")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens read at a time")
    parser.add_argument("--llama-chunk", type=int, default=2048, help="the same of Llama, whose mask grows with it")
    parser.add_argument("--compile", action="store_true", help="Llama's step by torch.compile and CUDA graphs")
    parser.add_argument("--longest", action="store_true", help="find each model's longest cache, too")
    parser.add_argument("--commit", help="where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON file, written after each row")
    options = parser.parse_args(arguments)
    for name in ("lengths", "fill", "batch", "new", "chunk", "llama_chunk"):
        given = getattr(options, name)
        least = 2 if name == "new" else 1
        for number in given if isinstance(given, list) else [given]:
            if number < least:
                parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {number}")
    return options


def line(row: dict[str, Any]) -> str:
    """A row in short, as it is printed."""
    where = f"{row['model']}, {row['batch']} x {row['length']}, {row['context']}"
    found = [form.format(row[name]) for name, form in _PRINTED.items() if row.get(name) is not None]
    return f"{where}: {', '.join(found)}" if found else where


def run(options: argparse.Namespace, device: torch.device) -> None:
    """Every row is printed and written at once: a run that is stopped keeps what it has."""
    meta = record.meta(options.commit) | {"copy_bytes_per_second": timing.copy_bandwidth()}
    result: dict[str, Any] = {"meta": meta, "rows": []}
    for name in options.models:
        for row in rows_of(name, options, device):
            result["rows"].append(row)
            print(line(row), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
        _release()


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        print("error: this needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    run(options, torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
