"""The quickstart's page: one HTML file with numbers, plots and samples, that needs nothing beside it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from hylo.evaluate.report import format_bytes
from hylo.quickstart.measure import stage_rows
from hylo.quickstart.report import QuickstartReport

_COLORS = {"ild": "#8a6d3b", "kd": "#c8553d"}
_PLOTS = (
    ("training", "Training loss of the two stages."),
    ("loss_by_position", "Held-out loss by the number of tokens a prediction can look back on."),
    ("memory", "Memory of one sequence while generating: cache, which grows, and state, which does not."),
    ("needle_likelihood", "Needle test: is the hidden number the most likely of ten?"),
)

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>HyLo quickstart</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #2e3440; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: 0.3rem 1.2rem 0.3rem 0; border-bottom: 1px solid #d8dee9; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
figure { margin: 1.5rem 0; }
figcaption, .note { color: #4c566a; font-size: 0.9rem; }
pre { background: #f4f5f7; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; line-height: 1.35; }
pre b { font-weight: normal; color: #8a93a5; }
</style>
</head>
<body>
<h1>HyLo quickstart</h1>
<p>$summary</p>
<h2>Teacher and hybrid</h2>
$models
<p class="note">$text_note</p>
<h2>From initialisation to distillation</h2>
$stages
<h2>Plots</h2>
$plots
<h2>A sample</h2>
<p class="note">Drawn at temperature 0.7 from the 40 likeliest tokens, same seed; the lines in grey were given.</p>
<h3>Teacher</h3>
<pre><b>$prompt</b>$teacher_sample</pre>
<h3>Hybrid</h3>
<pre><b>$prompt</b>$hybrid_sample</pre>
<h2>Time</h2>
$seconds
<p class="note">$versions</p>
</body>
</html>
""")


def plot_training(log: Path, stages: Sequence[str], path: Path) -> Path:
    """Training loss over the steps, a panel a stage: the two stages' losses have different units."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    titles = {"ild": "layer by layer (sum of L2 distances)", "kd": "predictions (KL, nats per token)"}
    for axes, stage in zip(panels, stages, strict=True):
        rows = stage_rows(log, stage)
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=_COLORS[stage])
        axes.set_title(f"{stage}: {titles[stage]}", fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("training loss")
    figure.savefig(path, dpi=160)
    return path


def write_page(report: QuickstartReport, plots: Sequence[Path], path: Path) -> Path:
    """Write the page to `path`, with the PNG files of `plots` inside."""
    fields = {
        "summary": _summary(report),
        "models": _models(report),
        "text_note": _text_note(report),
        "stages": _stages(report),
        "plots": _figures({plot.stem: plot for plot in plots}),
        "prompt": escape(report.sample.prompt),
        "teacher_sample": escape(report.sample.teacher),
        "hybrid_sample": escape(report.sample.hybrid),
        "seconds": _table(["phase", "seconds"], [[k, f"{v:.0f}"] for k, v in report.seconds.items()]),
        "versions": _versions(report),
    }
    path.write_text(_PAGE.substitute(fields), encoding="utf-8")
    return path


def _summary(report: QuickstartReport) -> str:
    mla = report.mixer_types.count("mla")
    layout = f"{mla} MLA and {len(report.mixer_types) - mla} Gated DeltaNet layers"
    form = " This is the short form, with a tenth of the training steps." if report.short else ""
    return (
        f"A Transformer of {len(report.mixer_types)} layers became a hybrid of {layout}. Its cache grows by "
        f"<b>{report.cache_percent:.2f} %</b> of the teacher's bytes per token, and its loss on text that neither "
        f"model was trained on is <b>{report.loss_excess_percent:.1f} %</b> above the teacher's.{form}"
    )


def _models(report: QuickstartReport) -> str:
    cache, state = report.cache_bytes_per_token, report.state_bytes_per_sequence
    rows = [
        ["parameters", f"{report.parameters.teacher:,}", f"{report.parameters.hybrid:,}"],
        ["held-out loss, nats per token", f"{report.teacher_loss:.4f}", f"{report.loss_after_kd:.4f}"],
        ["held-out bits per byte", f"{report.teacher_bits_per_byte:.3f}", f"{report.hybrid_bits_per_byte:.3f}"],
        ["cache per token", format_bytes(cache.teacher), format_bytes(cache.hybrid)],
        ["state per sequence", format_bytes(state.teacher), format_bytes(state.hybrid)],
    ]
    for mode, score in report.needle.items():
        label = f"needle, by {mode} (chance {score.chance:.0%})"
        rows.append([label, f"{score.teacher:.0%}", f"{score.hybrid:.0%}"])
    return _table(["", "teacher", "hybrid"], rows)


def _text_note(report: QuickstartReport) -> str:
    return (
        f"Held-out text: {report.held_out_bytes:,} bytes, {report.held_out_tokens:,} tokens of this Python's standard "
        f"library, which <code>xz -9e</code> packs to {report.xz_bits_per_byte:.3f} bits per byte. Sizes are those of "
        f"fp32, in which the quickstart computes. From {report.crossover_tokens:,.0f} tokens on the hybrid needs less "
        f"memory than the teacher, state included."
    )


def _stages(report: QuickstartReport) -> str:
    ild, kd = report.training["ild"], report.training["kd"]
    points = [
        ("after initialisation", "", report.loss_after_init),
        ("after alignment (ILD)", f"{ild.tokens:,}", report.loss_after_ild),
        ("after distillation (KL)", f"{kd.tokens:,}", report.loss_after_kd),
        ("teacher", "", report.teacher_loss),
    ]
    rows = [[name, tokens, f"{loss:.4f}", f"{loss - report.teacher_loss:+.4f}"] for name, tokens, loss in points]
    return _table(["hybrid", "tokens of training", "held-out loss", "over the teacher"], rows)


def _figures(plots: dict[str, Path]) -> str:
    figures = []
    for name, caption in _PLOTS:
        data = base64.b64encode(plots[name].read_bytes()).decode()
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        figures.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join(figures)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line("th", head), *(line("td", row) for row in rows), "</table>"])


def _versions(report: QuickstartReport) -> str:
    v = report.versions
    commit = f"commit {escape(v.commit)}, " if v.commit else ""
    return f"{commit}Python {v.python}, torch {v.torch}, transformers {v.transformers}, threads: {v.threads}."
