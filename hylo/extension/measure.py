"""What is measured of one model: loss within the teacher's context, loss by position far beyond it, needles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hylo.evaluate import (
    LossReport,
    ModelReader,
    NeedleGrid,
    NeedleSettings,
    build_cases,
    encode_text,
    held_out_loss,
    needle_grid,
)
from hylo.evaluate.needle import NeedleMode
from hylo.extension.recipe import Evaluation
from hylo.quickstart.report import Record


class Numbers(Record):
    """Of one model on the held-out text: losses in nats per token, and retrieval scores 0 to 1.

    `short` is of windows of the teacher's context, `long` of windows of the long one; both count every token once.
    """

    short: LossReport
    long: LossReport
    needle: dict[NeedleMode, NeedleGrid]
    seconds: float

    def needle_within(self, mode: NeedleMode, window: int) -> float:
        """Mean score over the lengths up to `window`, each counted once."""
        grid = self.needle[mode]
        scores = [score for length, score in zip(grid.lengths, grid.by_length, strict=True) if length <= window]
        return sum(scores) / len(scores)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, text: str, evaluation: Evaluation, modes: Sequence[NeedleMode]
) -> Numbers:
    """Measure a causal LM on `text`, which is also the haystack.

    Raises:
        UserError: the text is shorter than the long window or cannot fill the longest needle prompt.
    """
    begin = time.perf_counter()
    tokens = encode_text(tokenizer, text)

    def loss(window: int) -> LossReport:
        batch = max(1, evaluation.batch_tokens // window)
        return held_out_loss(model, tokens, window=window, batch_size=batch, bos_token_id=tokenizer.bos_token_id)

    short, long = loss(evaluation.short_window), loss(evaluation.long_window)
    cases = build_cases(tokenizer, text, needle_settings(evaluation))
    reader = ModelReader(model, tokenizer, evaluation.needle_answer_tokens)
    return Numbers(
        short=short,
        long=long,
        needle={mode: needle_grid(reader, cases, mode) for mode in modes},
        seconds=round(time.perf_counter() - begin, 1),
    )


def needle_settings(evaluation: Evaluation) -> NeedleSettings:
    return NeedleSettings(
        lengths=tuple(evaluation.needle_lengths),
        depths=tuple(evaluation.needle_depths),
        repeats=evaluation.needle_repeats,
        digits=evaluation.needle_digits,
        max_new_tokens=evaluation.needle_answer_tokens,
    )
