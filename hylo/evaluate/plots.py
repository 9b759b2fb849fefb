"""PNG plots of an evaluation: loss by position, needle heat maps, memory against context length."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from hylo.evaluate.needle import NeedleGrid, NeedleMode
from hylo.evaluate.report import EvaluationReport, format_bytes, role_label

_COLORS = {"teacher": "#4c566a", "hybrid": "#c8553d"}
_MARKERS = {"teacher": "s", "hybrid": "o"}
DPI = 160
_CONTEXTS = [2**n for n in range(22)]  # tokens, up to 2M


def write_plots(report: EvaluationReport, out_dir: Path) -> list[Path]:
    """Write loss_by_position.png, memory.png and needle_<mode>.png into `out_dir`; returns their paths."""
    figures = {"loss_by_position": plot_loss(report), "memory": plot_memory(report)}
    for mode in report.needle:
        figures[f"needle_{mode}"] = plot_needle(report, mode)
    paths = [out_dir / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=DPI)
    return paths


def plot_loss(report: EvaluationReport) -> Figure:
    """Mean loss of each position bucket at the bucket's geometric middle, and the overall mean as a dashed line."""
    figure, axes = line_figure(6.4, 4.0)
    edges = {1}
    for role in _roles(report):
        loss = getattr(report.loss, role)
        middles = [((b.start + 1) * b.end) ** 0.5 for b in loss.by_position]
        label = f"{role_label(report, role)} (mean {loss.loss:.3f}, dashed)"
        values = [b.loss for b in loss.by_position]
        axes.plot(middles, values, _MARKERS[role] + "-", color=_COLORS[role], label=label, markersize=5)
        axes.axhline(loss.loss, color=_COLORS[role], linestyle="--", linewidth=0.9, alpha=0.7)
        edges |= {b.end for b in loss.by_position}
    log2_tokens(axes, sorted(edges))
    axes.set_xlim(1, max(edges))
    axes.set_xlabel("tokens of context (ticks are the edges of the buckets)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Held-out loss by position, window {report.loss.hybrid.window:,} tokens")
    figure.legend(loc="outside lower center", frameon=False)
    return figure


def plot_memory(report: EvaluationReport) -> Figure:
    """Cache plus state of one sequence against its length, with the crossover where there is one."""
    figure, axes = line_figure(6.4, 4.0)
    for role in _roles(report):
        memory = getattr(report.cache, role)
        label = f"{role}: {format_bytes(memory.per_token)}/token"
        label += f" + {format_bytes(memory.state)} state" if memory.state else ""
        axes.plot(_CONTEXTS, [memory.total(n) for n in _CONTEXTS], color=_COLORS[role], label=label, linewidth=2)
    crossover = report.crossover_tokens
    if crossover is not None and crossover >= 1:
        total = report.cache.hybrid.total(round(crossover))
        axes.plot([crossover], [total], "o", color="black", markersize=5, zorder=3)
        axes.annotate(
            f"equal at {crossover:,.0f} tokens\n({format_bytes(total)})",
            (crossover, total),
            xytext=(12, -8),
            textcoords="offset points",
            verticalalignment="top",
        )
    log2_tokens(axes, _CONTEXTS[::3])
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2**5, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("cache and state of one sequence")
    axes.set_title("Inference memory, from the formulas")
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_needle(report: EvaluationReport, mode: NeedleMode) -> Figure:
    """Retrieval score over context length and needle depth, one heat map a model on one colour scale."""
    roles = _roles(report)
    pair = report.needle[mode]
    columns = len(pair.hybrid.lengths)
    width = max(5.0, (1.3 + 0.75 * columns) * len(roles) + 1.2)
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    panels = figure.subplots(1, len(roles), squeeze=False, sharey=True)[0]
    for axes, role in zip(panels, roles, strict=True):
        grid = getattr(pair, role)
        image = _heat_map(axes, grid)
        axes.set_title(f"{role_label(report, role)}\nmean {grid.mean:.0%}", fontsize=10)
        axes.set_xlabel("context length (tokens)")
    panels[0].set_ylabel("needle depth (% of context)")
    figure.colorbar(image, ax=list(panels), label="retrieved (%)", format=FuncFormatter(_percent))
    figure.suptitle(f"Needle in a haystack by {mode} (chance {pair.hybrid.chance:.0%})", fontsize=12)
    return figure


def _heat_map(axes: Any, grid: NeedleGrid) -> Any:
    image = axes.imshow(grid.scores, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(grid.lengths)), [f"{n:,}" for n in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [f"{100 * d:g}" for d in grid.depths])
    for row, scores in enumerate(grid.scores):
        for column, score in enumerate(scores):
            color = "black" if score > 0.6 else "white"
            axes.text(column, row, _percent(score), color=color, ha="center", va="center", fontsize=9)
    return image


def line_figure(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure of `width` x `height` inches and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def log2_tokens(axes: Any, ticks: Sequence[int]) -> None:
    """Make x an axis of token counts with `ticks`, each twice as far as its half."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _short(tokens: float) -> str:
    """Token counts with binary suffixes where they are whole: 8192 -> '8K'."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens / size:g}{suffix}"
    return f"{tokens:g}"


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.0f}"


def _roles(report: EvaluationReport) -> list[str]:
    return ["hybrid"] if report.name.teacher is None else ["teacher", "hybrid"]
