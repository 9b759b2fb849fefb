"""What the quickstart found out, as one JSON file with fixed fields."""

import platform
from typing import Any, Generic, TypeVar

import torch
import transformers
from pydantic import BaseModel, ConfigDict

from hylo.evaluate import EvaluationReport
from hylo.provenance import source_commit
from hylo.quickstart.corpus import Corpus, xz_bits_per_byte

T = TypeVar("T")


class Record(BaseModel):
    """Complete when made, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Both(Record, Generic[T]):
    """The same number of both models."""

    teacher: T
    hybrid: T


class Needle(Both[float]):
    """Mean retrieval score over lengths and depths, 0 to 1, and what guessing scores."""

    chance: float


class Sample(Both[str]):
    """What each model writes after the same prompt."""

    prompt: str


class Training(Record):
    """Length of a stage."""

    steps: int
    tokens: int


class Versions(Record):
    """What the numbers were made with. `commit` is None outside a git checkout."""

    commit: str | None
    python: str
    torch: str
    transformers: str
    threads: int


class QuickstartReport(Record):
    """Losses are nats per token on the same held-out text, sizes bytes, `seconds` by phase."""

    teacher_loss: float
    loss_after_init: float
    loss_after_ild: float
    loss_after_kd: float
    teacher_bits_per_byte: float
    hybrid_bits_per_byte: float
    xz_bits_per_byte: float
    cache_bytes_per_token: Both[int]
    state_bytes_per_sequence: Both[int]
    cache_percent: float
    crossover_tokens: float
    needle: dict[str, Needle]
    sample: Sample
    seconds: dict[str, float]
    mixer_types: list[str]
    parameters: Both[int]
    training: dict[str, Training]
    training_text_bytes: int
    held_out_bytes: int
    held_out_tokens: int
    short: bool
    versions: Versions

    @property
    def loss_excess_percent(self) -> float:
        """By how much the hybrid's held-out loss is above the teacher's."""
        return 100 * (self.loss_after_kd / self.teacher_loss - 1)


def make_report(
    *,
    corpus: Corpus,
    loss_after_init: float,
    loss_after_ild: float,
    evaluation: EvaluationReport,
    mixer_types: list[str],
    sample: Sample,
    training: dict[str, Training],
    seconds: dict[str, float],
    short: bool,
) -> QuickstartReport:
    """The report of one run; `evaluation` is that of the finished hybrid beside its teacher."""
    teacher = _known(evaluation.loss.teacher)
    return QuickstartReport(
        teacher_loss=teacher.loss,
        loss_after_init=loss_after_init,
        loss_after_ild=loss_after_ild,
        loss_after_kd=evaluation.loss.hybrid.loss,
        teacher_bits_per_byte=_known(teacher.bits_per_byte),
        hybrid_bits_per_byte=_known(evaluation.loss.hybrid.bits_per_byte),
        xz_bits_per_byte=xz_bits_per_byte(corpus.held_out),
        cache_bytes_per_token=_both(evaluation.cache_bytes_per_token),
        state_bytes_per_sequence=_both(evaluation.state_bytes_per_sequence),
        cache_percent=_known(evaluation.cache_percent).with_key_scales,
        crossover_tokens=_known(evaluation.crossover_tokens),
        needle={mode: _needle(grids) for mode, grids in evaluation.needle.items()},
        sample=sample,
        seconds={phase: round(value, 1) for phase, value in seconds.items()},
        mixer_types=mixer_types,
        parameters=_both(evaluation.parameters),
        training=training,
        training_text_bytes=corpus.train_bytes,
        held_out_bytes=corpus.held_out_bytes,
        held_out_tokens=teacher.tokens,
        short=short,
        versions=versions(),
    )


def _known(value: T | None) -> T:
    """Values that an evaluation lacks only without a teacher, or without the size of its text."""
    if value is None:
        raise ValueError("the evaluation is not of a hybrid beside its teacher on a text of known size")
    return value


def _both(pair: Any) -> Both[int]:
    return Both[int](teacher=pair.teacher, hybrid=pair.hybrid)


def _needle(grids: Any) -> Needle:
    return Needle(teacher=grids.teacher.mean, hybrid=grids.hybrid.mean, chance=grids.hybrid.chance)


def versions() -> Versions:
    """Of this process."""
    return Versions(
        commit=source_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=torch.get_num_threads(),
    )
