"""An engine around a hybrid model: prompts are read in chunks, then every step makes one token of each sequence."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hylo.errors import UserError
from hylo.inference.pools import Pools
from hylo.inference.sampling import GREEDY, Sampling, sample
from hylo.inference.tokens import Tokens
from hylo.mixers.packing import product, settled
from hylo.model import HyloForCausalLM

Prompt = Sequence[int] | Tensor
Progress = Callable[[int, int], None]


class Engine:
    """Generates from a model, with caches allocated once (docs/inference.md).

    A sequence has its own length, and its rows lie from the first one on: nothing is padded. Prompts are read one after
    the other, each in chunks; what that takes beside the caches is bounded by the chunk. A decode step is the whole
    model for one token of each sequence and the choice of the next one; on a GPU it is one CUDA graph, captured after
    the first step for its number of sequences and sampling. Positions count on the device, lengths on the host as well:
    a step waits for nothing.

    The model's weights are packed in place (`hylo.mixers.packing`): names and values stay. Nothing may change them as
    long as the engine is used, and no two threads may use one engine.

    Args:
        model: on the device and in the dtype to run in.
        batch: how many sequences the caches hold.
        capacity: how many tokens each of them may have, the new ones included.
        chunk: tokens of a prompt read at a time.
        graph: whether steps run as CUDA graphs; None: on a GPU.
    Raises:
        UserError: a number is not positive, a layer has an adapter or quantised weights, there is no GPU to capture a
            graph on, or the caches do not fit in memory.
    """

    def __init__(
        self,
        model: HyloForCausalLM,
        *,
        batch: int = 1,
        capacity: int,
        chunk: int = 8192,
        graph: bool | None = None,
    ) -> None:
        for name, number in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
            if number < 1:
                raise UserError(f"{name} must be at least 1, got {number}")
        self.model, self.batch, self.capacity, self.chunk = model.eval(), batch, capacity, chunk
        self._head = model.lm_head.weight
        self._device = self._head.device
        on_gpu = self._device.type == "cuda"
        _check_plain(model)
        if graph and not on_gpu:
            raise UserError(f"graph=True needs a model on a CUDA device, got one on {self._device}")
        self.graph = on_gpu if graph is None else graph
        for module in model.modules():
            if callable(pack := getattr(module, "pack_", None)):
                pack()
        with _room(f"The caches of {batch} sequences of {capacity} tokens need", "a smaller batch or capacity"):
            self.pools = Pools([layer.mixer for layer in model.model.layers], batch, capacity, self._head)
        self._logits = self._head.new_empty(0, len(self._head))
        self._tokens = Tokens(batch, self._device)
        self._generator = torch.Generator(self._device)
        self._loaded: set[tuple[int, Sampling]] = set()  # whose kernels are
        self._graphs: dict[tuple[int, Sampling, int], _CapturedStep] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.graph else None
        self._lengths: list[int] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens in the caches, of each sequence that is there."""
        return list(self._lengths)

    @property
    def logits(self) -> Tensor:
        """[sequences, vocabulary] that the next token is chosen from, or was; overwritten by the next step."""
        return self._logits

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, the one that ends a sequence included. The arguments are `stream`'s."""
        found: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens=max_new_tokens, **options):
            for sequence, token in zip(found, tokens, strict=True):
                if token is not None:
                    sequence.append(token)
        return found

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        end: int | Collection[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[list[int | None]]:
        """Reads the prompts, then yields one token of each sequence at a time, None for those that have ended.

        Args:
            prompts: up to `batch` of them, token ids each: integers, or a tensor [T] of integers.
            max_new_tokens: of each sequence.
            sampling: how tokens are chosen; the likeliest by default.
            seed: of drawn tokens.
            end: token or tokens that end a sequence; None: those of the model's generation config.
            progress: called with how many tokens of all prompts are read, and how many there are, after each chunk. It
                makes the host wait for the chunk.
        Raises:
            UserError: no prompt or too many, one that is empty, too long or has an unknown token, or memory that does
                not suffice.
        """
        _check_count(max_new_tokens)
        checked = [self._checked(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        self.prefill(checked, progress=progress)
        return self.decode(max_new_tokens, sampling=sampling, seed=seed, end=end)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Prompt], *, progress: Progress | None = None) -> None:
        """Begins anew, with these prompts in the caches and the logits of their last tokens."""
        checked = [self._checked(i, prompt, 0) for i, prompt in enumerate(prompts)]
        self._begin([len(prompt) for prompt in checked])
        last = self._head.new_empty(len(checked), self._head.shape[1])
        done, total = 0, sum(self._lengths)
        with _room(f"A chunk of {self.chunk} tokens needs", "a smaller chunk"):
            for sequence, prompt in enumerate(checked):
                for begin in range(0, len(prompt), self.chunk):
                    piece = prompt[begin : begin + self.chunk]
                    last[sequence] = self._read(piece.to(self._device), sequence, begin)
                    done += len(piece)
                    if progress is not None:
                        self._wait()
                        progress(done, total)
            self._logits = self._score(last)

    @torch.no_grad()
    def fill(self, length: int, *, sequences: int = 1, seed: int = 0) -> None:
        """Begins anew, with random rows and states in place of `length` tokens: for measurements of long contexts."""
        if not 0 < length <= self.capacity:
            raise UserError(f"length must be 1 to the capacity of {self.capacity}, got {length}")
        if not 0 < sequences <= self.batch:
            raise UserError(f"sequences must be 1 to the batch of {self.batch}, got {sequences}")
        self._begin([length] * sequences)
        generator = torch.Generator(self._device).manual_seed(seed)
        for rows in self.pools.rows:
            for sequence in rows[:sequences]:
                sequence[:length].normal_(generator=generator)
        self.pools.conv.normal_(generator=generator)
        self.pools.recurrent.normal_(std=0.01, generator=generator)
        self._logits = self._head.new_zeros(sequences, len(self._head))

    def decode(
        self,
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        end: int | Collection[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Goes on from what `prefill` or `fill` left, as `stream` does.

        The step that follows a token is on its way before the token is handed out: at its end, the caches may hold
        one token more than were yielded.
        """
        _check_count(max_new_tokens)
        if not self._lengths:
            raise UserError("there is nothing to go on from: call prefill or fill first")
        if max(self._lengths) + max_new_tokens > self.capacity:
            raise UserError(
                f"{max(self._lengths)} tokens and {max_new_tokens} new ones exceed the capacity of {self.capacity}"
            )
        return self._decode(max_new_tokens, sampling, seed, self._ends(end))

    def _decode(
        self, max_new_tokens: int, sampling: Sampling, seed: int, ends: Collection[int]
    ) -> Iterator[list[int | None]]:
        count = len(self._lengths)
        ended = [False] * count
        self._generator.manual_seed(seed)
        self._choose(self._logits, sampling, 0)
        for turn in range(max_new_tokens):
            collect = self._tokens.send(turn, count)
            if turn + 1 < max_new_tokens:
                self._advance(count, sampling, turn + 1)
            tokens = collect()
            yield [None if over else token for token, over in zip(tokens, ended, strict=True)]
            ended = [over or token in ends for token, over in zip(tokens, ended, strict=True)]
            if all(ended):
                return

    def _checked(self, index: int, prompt: Prompt, new: int) -> Tensor:
        ids = torch.as_tensor(prompt, device="cpu")
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
            raise UserError(f"prompt {index} must be at least one token id, got {prompt!r}")
        if len(ids) + new > self.capacity:
            raise UserError(
                f"{len(ids)} tokens of prompt {index} and {new} new ones exceed the capacity of {self.capacity}"
            )
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= len(self._head):
            wrong = least if least < 0 else most
            raise UserError(f"the tokens of prompt {index} must be 0 to {len(self._head) - 1}, got {wrong}")
        return ids.long()

    def _ends(self, end: int | Collection[int] | None) -> Collection[int]:
        config: Any = self.model.generation_config
        end = config.eos_token_id if end is None else end
        return () if end is None else (end,) if isinstance(end, int) else tuple(end)

    def _begin(self, lengths: list[int]) -> None:
        if not 0 < len(lengths) <= self.batch:
            raise UserError(f"there must be 1 to {self.batch} prompts, the engine's batch, got {len(lengths)}")
        self.pools.clear()
        self._lengths = lengths
        self.pools.cursor.position[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=self._device)

    def _read(self, tokens: Tensor, sequence: int, begin: int) -> Tensor:
        """[D] of the last of these tokens, which come at position `begin`."""
        self.pools.cursor.read(sequence, begin)
        positions = torch.arange(begin, begin + len(tokens), device=self._device)
        return self._through_layers(tokens[None], positions[None], lengths=[begin + len(tokens)])[0, -1]

    def _through_layers(self, tokens: Tensor, positions: Tensor, **how: Any) -> Tensor:
        """Tokens and positions [B, T] -> [B, T, D], before the last norm."""
        model = self.model.model
        hidden = model.embed_tokens(tokens)
        how["position_embeddings"] = model.rotary(positions, hidden.dtype)
        for layer, state in zip(model.layers, self.pools.layers, strict=True):
            hidden = layer(hidden, state=state, in_place=True, **how)
        return hidden

    def _score(self, hidden: Tensor) -> Tensor:
        """[B, D] -> logits [B, vocabulary]."""
        # not on the way into the product: each of its many blocks would norm all of it
        return product(self.model.model.norm(hidden), self.model.lm_head)

    @torch.no_grad()
    def _choose(self, logits: Tensor, sampling: Sampling, turn: int) -> None:
        self._tokens.row(turn)[: len(logits)].copy_(sample(logits, sampling, self._generator))

    @torch.no_grad()
    def _step(self, count: int, sampling: Sampling, turn: int) -> Tensor:
        """One more token of each sequence, and the logits that it is chosen from. It follows that of the turn before.

        Nothing here depends on a number that only the device has.
        """
        cursor = self.pools.cursor
        cursor.decode(count)
        torch.add(cursor.position[:count], 1, out=cursor.lengths[:count])
        with settled():
            newest = self._tokens.row(turn - 1)[:count, None]
            hidden = self._through_layers(newest, cursor.position[:count, None], absorb=True)
            logits = self._score(hidden[:, 0])
        self._choose(logits, sampling, turn)
        cursor.position[:count].copy_(cursor.lengths[:count])
        return logits

    def _advance(self, count: int, sampling: Sampling, turn: int) -> None:
        """`_step`, as a graph from the second time on: the first one loads kernels, which no graph can capture.

        A graph has fixed places for its tokens, so there are two that take turns.
        """
        if not self.graph or (count, sampling) not in self._loaded:
            self._logits = self._step(count, sampling, turn)
            self._loaded.add((count, sampling))
        else:
            key = count, sampling, turn % 2
            if key not in self._graphs:
                self._graphs[key] = self._captured(*key)
            self._logits = self._graphs[key].replay()
        self._lengths = [length + 1 for length in self._lengths]

    def _captured(self, count: int, sampling: Sampling, turn: int) -> "_CapturedStep":
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        # one pool for all: what a replay leaves behind lies outside it
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(count, sampling, turn)
        return _CapturedStep(graph, logits)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()


@dataclass(frozen=True)
class _CapturedStep:
    """A step as a graph, and where it leaves its logits: no other graph of the pool writes there."""

    graph: Any
    logits: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.logits


def _check_plain(model: HyloForCausalLM) -> None:
    """Steps take the weights of layers, so these must be all that a layer is."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or (isinstance(module, nn.Linear) and type(module) is not nn.Linear):
            raise UserError(f"the engine needs plain linear layers, got {name} of type {type(module).__name__}")


def _check_count(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


@contextmanager
def _room(what: str, smaller: str) -> Iterator[None]:
    """One sentence in place of a failed allocation's page."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{what} more memory than the GPU has left: ask for {smaller}") from error
