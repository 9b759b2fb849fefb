"""PNG plots of the demonstration: loss by position and needles by length, each hybrid before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hylo.evaluate.needle import NeedleMode
from hylo.evaluate.plots import DPI, line_figure, log2_tokens
from hylo.extension.measure import Numbers
from hylo.extension.report import ExtensionReport

_COLORS = ("#c8553d", "#2a6f97", "#6a994e", "#8a6d3b")
_TEACHER = "#4c566a"


def write_extension_plots(report: ExtensionReport, out: Path) -> list[Path]:
    """Write loss_by_position.png and needle_<mode>.png into `out`; returns their paths."""
    modes = dict.fromkeys(mode for one in report.hybrids.values() for mode in one.after.needle)
    return [_plot_loss(report, out), *(_plot_needle(report, mode, out) for mode in modes)]


def _models(report: ExtensionReport) -> Iterator[tuple[str, Numbers, str, str]]:
    """Label, numbers, line style and colour of everything that was measured."""
    yield "teacher", report.teacher, "s:", _TEACHER
    for number, (name, hybrid) in enumerate(report.hybrids.items()):
        color = _COLORS[number % len(_COLORS)]
        yield f"{name} before", hybrid.before, "o--", color
        yield f"{name} after", hybrid.after, "o-", color


def _plot_loss(report: ExtensionReport, out: Path) -> Path:
    figure, axes = line_figure(6.4, 4.4)
    for label, numbers, style, color in _models(report):
        middles = [((bucket.start + 1) * bucket.end) ** 0.5 for bucket in numbers.long.by_position]
        axes.plot(middles, [bucket.loss for bucket in numbers.long.by_position], style, color=color, label=label)
    log2_tokens(axes, [bucket.end for bucket in report.teacher.long.by_position])
    # A model far beyond its context would press all others into a line at the bottom.
    axes.set_ylim(top=1.3 * report.teacher.short.by_position[0].loss)
    axes.axvline(report.short_window, color=_TEACHER, linewidth=0.8)
    axes.set_xlabel("tokens of context (ticks are the edges of the buckets)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Held-out loss by position, {report.short_window:,} to {report.long_window:,} tokens")
    axes.legend(frameon=False)
    path = out / "loss_by_position.png"
    figure.savefig(path, dpi=DPI)
    return path


def _plot_needle(report: ExtensionReport, mode: NeedleMode, out: Path) -> Path:
    figure, axes = line_figure(6.4, 4.4)
    ticks: list[int] = []
    for label, numbers, style, color in _models(report):
        if mode in numbers.needle:
            grid = numbers.needle[mode]
            axes.plot(grid.lengths, grid.by_length, style, color=color, label=label)
            axes.axhline(grid.chance, color="black", linewidth=0.6)
            ticks = grid.lengths
    log2_tokens(axes, ticks)
    axes.set_ylim(-0.03, 1.03)
    axes.axvline(report.short_window, color=_TEACHER, linewidth=0.8)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("retrieved, share of the cases")
    axes.set_title(f"Needle in a haystack by {mode}")
    axes.legend(frameon=False)
    path = out / f"needle_{mode}.png"
    figure.savefig(path, dpi=DPI)
    return path
