"""What the demonstration found out, as one JSON file with fixed fields."""

from __future__ import annotations

from hylo.evaluate.needle import NeedleMode
from hylo.extension.measure import Numbers
from hylo.extension.recipe import Evaluation
from hylo.quickstart.report import Record, Training, Versions

NEEDLE_KEPT = 0.9  # the bar: share of the accuracy within the teacher's context
SHORT_LOSS_PERCENT = 3.0  # at most: short-context loss over that before the long training
FLAT_PERCENT = 1.0  # at most: loss far out in the long window over that far out in the short one


class StageRecord(Training):
    """A stage: its length, the time of its steps, and its training loss in the last logged step."""

    seconds: float
    last_loss: float


class Retrieval(Record):
    """Needle scores after the extension: mean within the teacher's context, at the longest, and their ratio."""

    within: float
    longest: float
    kept: float | None  # None where nothing is found within


class HybridReport(Record):
    """A hybrid before and after the long training. Percentages are of the loss that it is compared with.

    `flat_percent` compares, after the extension, the further half of the long windows with that of the short ones: half
    of the text each. Below 0 the longer context helps.
    """

    mixer_types: list[str]
    parameters: int
    before: Numbers
    after: Numbers
    stages: dict[str, StageRecord]
    needle: dict[NeedleMode, Retrieval]
    short_loss_percent: float
    flat_percent: float
    met: dict[str, bool]


class ExtensionReport(Record):
    """The whole run. Losses are nats per token on the same held-out text."""

    name: str
    device: str
    precision: str
    short_window: int
    long_window: int
    vocabulary: int
    train_bytes: int
    held_out_bytes: int
    teacher_parameters: int
    teacher_stages: dict[str, StageRecord]
    teacher: Numbers
    hybrids: dict[str, HybridReport]
    seconds: dict[str, float]  # by phase of this call; what an earlier one had done takes none
    versions: Versions


def hybrid_report(
    evaluation: Evaluation,
    before: Numbers,
    after: Numbers,
    *,
    mixer_types: list[str],
    parameters: int,
    stages: dict[str, StageRecord],
) -> HybridReport:
    """The comparison of both measurements, and which of the bars it meets."""
    needle = {mode: _retrieval(after, mode, evaluation.short_window) for mode in after.needle}
    short = 100 * (after.short.loss / before.short.loss - 1)
    flat = 100 * (after.long.by_position[-1].loss / after.short.by_position[-1].loss - 1)
    met = {f"needle_{mode}": one.kept is not None and one.kept >= NEEDLE_KEPT for mode, one in needle.items()}
    return HybridReport(
        mixer_types=mixer_types,
        parameters=parameters,
        before=before,
        after=after,
        stages=stages,
        needle=needle,
        short_loss_percent=short,
        flat_percent=flat,
        met=met | {"short_loss": short <= SHORT_LOSS_PERCENT, "flat": flat <= FLAT_PERCENT},
    )


def _retrieval(numbers: Numbers, mode: NeedleMode, window: int) -> Retrieval:
    within, longest = numbers.needle_within(mode, window), numbers.needle[mode].by_length[-1]
    return Retrieval(within=within, longest=longest, kept=longest / within if within else None)
