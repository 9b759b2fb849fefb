"""Measurements of the quickstart: loss on the same held-out text in the same windows, time out of a training log."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hylo.evaluate import LossReport, encode_text, held_out_loss
from hylo.quickstart.corpus import Corpus

WINDOW = 512  # tokens; the length that the teacher is trained at


def held_out_text(corpus: Corpus) -> str:
    """The held-out documents one after the other, as `xz` gets them."""
    return "".join(document.text for document in corpus.held_out)


def model_loss(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, *, batch_size: int = 8) -> LossReport:
    """Loss of `model` on `text`: every token counts once, bits per byte are those of a code for the whole text."""
    return held_out_loss(
        model,
        encode_text(tokenizer, text),
        window=WINDOW,
        batch_size=batch_size,
        bos_token_id=tokenizer.bos_token_id,
        text_bytes=len(text.encode()),
    )


def stage_rows(log: Path, stage: str) -> list[dict[str, Any]]:
    """The rows of one stage in a run's log.jsonl, in order of their steps."""
    rows = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["stage"] == stage]


def stage_seconds(rows: list[dict[str, Any]]) -> float:
    """Time that the steps of a stage took, over all processes that a resumed run had."""
    tokens = [0, *(row["tokens"] for row in rows)]
    return sum((new - old) / row["tokens_per_second"] for (old, new), row in zip(pairwise(tokens), rows, strict=True))
