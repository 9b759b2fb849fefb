"""Needle in a haystack: one sentence with a random number, hidden in local text at a length and a depth, asked for.

Two scorers. Generation: the greedy continuation must contain the number (substring recall, chance 0). Likelihood, for
models too small to answer in words: the number must get the highest log-likelihood among distractors drawn from the
same numbers, so that a model that does not read the haystack scores 1 / candidates on average, whatever it prefers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from transformers import GenerationConfig

from hylo.errors import UserError
from hylo.evaluate.common import encode_text, evaluating

NeedleMode = Literal["likelihood", "generation"]

NEEDLE_KEYS = (
    "amber",
    "basil",
    "cedar",
    "ember",
    "grove",
    "harbor",
    "island",
    "maple",
    "onyx",
    "pebble",
    "river",
    "willow",
)
_SNAP = 0.05  # share of the haystack over which a depth may move back to the end of a sentence or line


@dataclass(frozen=True)
class NeedleTemplate:
    """Texts with `{key}` and `{value}`; `answer` follows `question` directly."""

    needle: str
    question: str
    answer: str


PROSE_NEEDLE = NeedleTemplate(
    needle=" The secret number of {key} is {value}.",
    question=" What is the secret number of {key}? The secret number of {key} is",
    answer=" {value}",
)
CODE_NEEDLE = NeedleTemplate(needle="\n{key}_code = {value}\n", question="\n{key}_code =", answer=" {value}")


@dataclass(frozen=True)
class NeedleSettings:
    """The grid: `lengths` (tokens of the whole prompt) x `depths` (0 start, 1 end) x `repeats` cases each."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    repeats: int = 4
    modes: tuple[NeedleMode, ...] = ("likelihood", "generation")
    distractors: int = 9
    digits: int = 5
    max_new_tokens: int = 16
    template: NeedleTemplate = PROSE_NEEDLE
    seed: int = 0


@dataclass(frozen=True)
class NeedleCase:
    """One prompt of exactly `length` tokens. `candidates` are token ids, the right answer first."""

    length: int
    depth: float
    prompt: list[int]
    value: str
    candidates: list[list[int]]


class NeedleGrid(BaseModel):
    """Mean scores, 0 to 1: `scores[i][j]` at `depths[i]` and `lengths[j]`."""

    model_config = ConfigDict(frozen=True)

    mode: NeedleMode
    lengths: list[int]
    depths: list[float]
    scores: list[list[float]]
    mean: float
    chance: float
    cases: int

    @property
    def by_length(self) -> list[float]:
        """Mean over the depths, for each of `lengths`."""
        return [_mean(scores) for scores in zip(*self.scores, strict=True)]


class NeedleReader(Protocol):
    """What is tested: a model behind a tokenizer, or a stand-in."""

    def generate(self, case: NeedleCase) -> str:
        """Text that follows the prompt."""

    def log_likelihoods(self, case: NeedleCase) -> torch.Tensor:
        """[candidates] log-likelihood of each candidate after the prompt."""


def build_cases(tokenizer: Any, haystack: str, settings: NeedleSettings) -> list[NeedleCase]:
    """All cases of the grid, equal for equal arguments.

    A prompt is [bos] + haystack[:depth] + needle + haystack[depth:] + question; the haystack fills it to `length`
    tokens. Each case takes another stretch of the haystack, key and number. The depth moves back to the end of a
    sentence or line where one is within 5 % of the haystack.

    Raises:
        UserError: empty grid, depth outside 0..1, a length that the needle does not fit in or the haystack cannot
            fill, or a haystack that contains too many of the numbers.
    """
    _check_settings(settings)
    stack = _haystack(tokenizer, haystack)
    cases = []
    for length in settings.lengths:
        for depth in settings.depths:
            for repeat in range(settings.repeats):
                rng = random.Random(f"{settings.seed}/{length}/{depth}/{repeat}")
                cases.append(_build_case(tokenizer, stack, settings, length, depth, rng))
    return cases


def needle_grid(reader: NeedleReader, cases: Sequence[NeedleCase], mode: NeedleMode) -> NeedleGrid:
    """Score every case and average over the repeats of each length and depth."""
    score = _generation_score if mode == "generation" else _likelihood_score
    cells: dict[tuple[float, int], list[float]] = {}
    for case in cases:
        cells.setdefault((case.depth, case.length), []).append(score(reader, case))
    lengths = sorted({length for _, length in cells})
    depths = sorted({depth for depth, _ in cells})
    scores = [[_mean(cells[depth, length]) for length in lengths] for depth in depths]
    return NeedleGrid(
        mode=mode,
        lengths=lengths,
        depths=depths,
        scores=scores,
        mean=_mean([value for row in scores for value in row]),
        chance=0.0 if mode == "generation" else 1 / len(cases[0].candidates),
        cases=len(cases),
    )


class ModelReader:
    """A Hugging Face causal LM as a reader: greedy generation, and candidates scored on one shared prefill."""

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int = 16) -> None:
        self._model = model
        self._tokenizer = tokenizer
        eos = model.generation_config.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0 if first_eos is None else first_eos,  # never used: one sequence at a time
        )

    def generate(self, case: NeedleCase) -> str:
        """Greedy continuation, special tokens left out."""
        prompt = torch.tensor([case.prompt], device=self._model.device)
        with evaluating(self._model):
            output = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=self._generation
            )
        return str(self._tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))

    def log_likelihoods(self, case: NeedleCase) -> torch.Tensor:
        """[candidates] fp32 or wider, summed over each candidate's tokens."""
        device = self._model.device
        lengths = torch.tensor([len(c) for c in case.candidates], device=device)
        tokens = torch.zeros(len(case.candidates), int(lengths.max()), dtype=torch.long, device=device)
        for row, candidate in zip(tokens, case.candidates, strict=True):
            row[: len(candidate)] = torch.tensor(candidate, device=device)
        with evaluating(self._model):
            logits = self._candidate_logits(torch.tensor([case.prompt], device=device), tokens)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        each = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]  # [candidates, longest]
        counted = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        return (each * counted).sum(-1)

    def _candidate_logits(self, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[candidates, longest, vocabulary]; padding is on the right, where a causal model does not see it."""
        prefill = self._model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        first = prefill.logits[:, -1:].expand(tokens.shape[0], -1, -1)
        if tokens.shape[1] == 1:
            return first
        cache = prefill.past_key_values
        cache.reorder_cache(torch.zeros(tokens.shape[0], dtype=torch.long, device=prompt.device))
        rest = self._model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True).logits
        return torch.cat([first, rest], dim=1)


@dataclass(frozen=True)
class _Haystack:
    text: str
    ids: list[int]
    ends: list[bool]  # of each token: does it end a sentence or a line


def _haystack(tokenizer: Any, text: str) -> _Haystack:
    ids = encode_text(tokenizer, text)
    closing = {i for i in set(ids) if tokenizer.decode([i]).rstrip(" ").endswith((".", "!", "?", "\n"))}
    return _Haystack(text=text, ids=ids, ends=[i in closing for i in ids])


def _generation_score(reader: NeedleReader, case: NeedleCase) -> float:
    return float(case.value in reader.generate(case))


def _likelihood_score(reader: NeedleReader, case: NeedleCase) -> float:
    """1 if the answer leads alone, 1 / n if it leads with n - 1 others, else 0: equal scores throughout get chance."""
    scores = reader.log_likelihoods(case)
    leaders = scores == scores.max()
    return float(leaders[0]) / float(leaders.sum()) if leaders[0] else 0.0


def _build_case(
    tokenizer: Any,
    stack: _Haystack,
    settings: NeedleSettings,
    length: int,
    depth: float,
    rng: random.Random,
) -> NeedleCase:
    template, key = settings.template, rng.choice(NEEDLE_KEYS)
    values = _absent_numbers(stack.text, settings, rng)
    needle = encode_text(tokenizer, template.needle.format(key=key, value=values[0]))
    question = template.question.format(key=key)
    tail = encode_text(tokenizer, question)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(bos) - len(needle) - len(tail)
    if body < 1:
        raise UserError(f"needle length {length} is too short, the needle and its question need {length - body + 1}")
    if body > len(stack.ids):
        raise UserError(f"needle length {length} asks for {body} haystack tokens, the text has {len(stack.ids)}")
    start = rng.randrange(len(stack.ids) - body + 1)
    at = start + _snap(stack.ends, start, round(depth * body), body)
    prompt = [*bos, *stack.ids[start:at], *needle, *stack.ids[at : start + body], *tail]
    answers = [_continuation(tokenizer, question, template.answer.format(key=key, value=v)) for v in values]
    return NeedleCase(length=length, depth=depth, prompt=prompt, value=values[0], candidates=answers)


def _check_settings(settings: NeedleSettings) -> None:
    for name in ("lengths", "depths", "modes"):
        if not getattr(settings, name):
            raise UserError(f"the needle test has no {name}")
    for name in ("repeats", "distractors", "digits", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise UserError(f"needle {name} must be at least 1, got {getattr(settings, name)}")
    for depth in settings.depths:
        if not 0 <= depth <= 1:
            raise UserError(f"needle depth must be between 0 and 1, got {depth}")


def _absent_numbers(haystack: str, settings: NeedleSettings, rng: random.Random) -> list[str]:
    """Distinct numbers of `digits` digits that the haystack does not contain, the right answer first."""
    low, high = 10 ** (settings.digits - 1), 10**settings.digits
    numbers: list[str] = []
    for number in rng.sample(range(low, high), min(high - low, 1000)):
        if len(numbers) > settings.distractors:
            break
        if str(number) not in haystack:
            numbers.append(str(number))
    if len(numbers) <= settings.distractors:
        raise UserError(
            f"found {len(numbers)} numbers of {settings.digits} digits that the haystack does not contain, "
            f"needs {settings.distractors + 1}"
        )
    return numbers


def _snap(ends: list[bool], start: int, at: int, body: int) -> int:
    for position in range(at, max(0, at - int(_SNAP * body)) - 1, -1):
        if position == 0 or ends[start + position - 1]:
            return position
    return at


def _continuation(tokenizer: Any, question: str, answer: str) -> list[int]:
    """Tokens of `answer` as they stand after `question`."""
    head, whole = encode_text(tokenizer, question), encode_text(tokenizer, question + answer)
    if whole[: len(head)] != head:
        raise UserError(f"the tokenizer joins the end of the needle question {question!r} with the answer {answer!r}")
    return whole[len(head) :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
