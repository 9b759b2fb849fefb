"""The whole road in minutes on a CPU: bundled teacher, upcycling, alignment, distillation, evaluation, a report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from hylo.distill import load_recipe, run_recipe
from hylo.errors import UserError
from hylo.evaluate import CODE_NEEDLE, EvaluationReport, NeedleSettings, evaluate, render_table, write_plots
from hylo.quickstart.corpus import Corpus, load_corpus, write_jsonl
from hylo.quickstart.measure import WINDOW, held_out_text, model_loss, stage_rows, stage_seconds
from hylo.quickstart.page import plot_training, write_page
from hylo.quickstart.paths import path_overrides
from hylo.quickstart.report import QuickstartReport, Sample, Training, make_report
from hylo.quickstart.sample import PROMPT, continuation
from hylo.upcycle import upcycle

TEACHER = Path(__file__).parent / "teacher"
RECIPE = Path(__file__).parent / "quickstart.yaml"
SHORT_SCALE = 0.1  # share of the recipe's steps that the short form takes
STAGES = ("ild", "kd")

# One MLA layer of 96 + 16 cached elements a token, 8.75 % of the teacher's 5 layers x 2 x 4 heads x 32. It stands
# where the teacher looks back over the whole context; in any other place the loss rises fivefold (docs/quickstart.md).
HYBRID: dict[str, Any] = {
    "mixer": "gated_deltanet",
    "mla_layers": [3],
    "init": "aligned",
    "kv_lora_rank": 96,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "linear_num_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

BATCH = 8  # windows evaluated together
# By likelihood alone: models this small answer no question in words.
NEEDLE = NeedleSettings(
    lengths=(128, 256, 480), depths=(0.0, 0.5, 1.0), repeats=6, modes=("likelihood",), template=CODE_NEEDLE
)


@dataclass
class Clock:
    """Announces each phase and keeps the seconds it took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        self.console.rule(title, align="left")
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


@dataclass(frozen=True)
class Files:
    """Where a run keeps what."""

    out: Path

    @property
    def text(self) -> Path:
        return self.out / "train.jsonl"

    @property
    def student(self) -> Path:
        return self.out / "student"

    @property
    def distillation(self) -> Path:
        return self.out / "distillation"

    @property
    def log(self) -> Path:
        return self.distillation / "log.jsonl"

    def after(self, stage: str) -> Path:
        return self.distillation / stage / "model"


def run_quickstart(
    out: Path, *, short: bool = False, resume: bool = False, console: Console | None = None
) -> QuickstartReport:
    """Upcycle, align, distil and evaluate the bundled teacher on this machine's standard library.

    Args:
        out: new directory for everything: models, logs, report.json, plots and index.html.
        short: the same with a tenth of the training steps.
        resume: continue an interrupted run in `out`; without one it starts afresh.
    Raises:
        UserError: `out` exists and `resume` is off, or it holds another recipe's run.
    """
    if out.exists() and not resume:
        raise UserError(f"output directory '{out}' exists; --resume continues the run in it")
    disable_progress_bar()  # transformers' own, one for every checkpoint that is read
    clock, files = Clock(console or Console()), Files(out)
    begin = time.perf_counter()
    corpus = _prepare_text(clock, files)
    text = held_out_text(corpus)
    loss_after_init = _upcycle(clock, files, text)
    training = _distil(clock, files, short=short, resume=resume)
    loss_after_ild, evaluation = _evaluate(clock, files, text)
    sample = _sample(clock, files)
    plots = [*write_plots(evaluation, out), plot_training(files.log, STAGES, out / "training.png")]
    clock.seconds["total"] = time.perf_counter() - begin
    report = make_report(
        corpus=corpus,
        loss_after_init=loss_after_init,
        loss_after_ild=loss_after_ild,
        evaluation=evaluation,
        mixer_types=AutoConfig.from_pretrained(files.student).mixer_types,
        sample=sample,
        training=training,
        seconds=clock.seconds,
        short=short,
    )
    _write(report, plots, files, clock)
    return report


def _prepare_text(clock: Clock, files: Files) -> Corpus:
    with clock.phase("corpus", "text: the standard library of this Python"):
        corpus = load_corpus()
        files.out.mkdir(parents=True, exist_ok=True)
        write_jsonl(corpus.train, files.text)
        clock.console.print(
            f"{corpus.train_bytes:,} bytes to train on; {len(corpus.held_out)} modules, "
            f"{corpus.held_out_bytes:,} bytes, held out"
        )
    return corpus


def _upcycle(clock: Clock, files: Files, text: str) -> float:
    """Makes the student if it is not there yet; its loss before any training."""
    with clock.phase("upcycle", "upcycle: latent attention and Gated DeltaNet in place of attention"):
        if not files.student.exists():
            upcycle(str(TEACHER), out=files.student, **HYBRID)
        return _loss(clock, files.student, text)


def _loss(clock: Clock, directory: Path, text: str) -> float:
    report = model_loss(load(directory), AutoTokenizer.from_pretrained(directory), text, batch_size=BATCH)
    clock.console.print(f"{report.loss:.4f} nats per token, {report.bits_per_byte:.4f} bits per byte")
    return report.loss


def load(directory: Path) -> Any:
    """A checkpoint with its weights in fp32, the precision that the quickstart computes in."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _distil(clock: Clock, files: Files, *, short: bool, resume: bool) -> dict[str, Training]:
    paths = {
        "output": files.distillation,
        "student.path": files.student,
        "teacher": TEACHER,
        "data.sources.0.jsonl": files.text,
        "data.cache_dir": files.out / "tokens",
    }
    recipe = load_recipe(RECIPE, overrides=path_overrides(paths))
    clock.console.rule("distil: layer by layer (ild), then the teacher's predictions (kd)", align="left")
    scale = SHORT_SCALE if short else None
    run_recipe(recipe, resume=resume, steps_scale=scale, console=clock.console)
    rows = {stage: stage_rows(files.log, stage) for stage in STAGES}
    clock.seconds |= {stage: stage_seconds(rows[stage]) for stage in STAGES}
    return {stage: Training(steps=last["step"], tokens=last["tokens"]) for stage, (*_, last) in rows.items()}


def _evaluate(clock: Clock, files: Files, text: str) -> tuple[float, EvaluationReport]:
    """Loss after alignment, and everything about the finished hybrid beside its teacher."""
    with clock.phase("evaluation", "evaluate: loss, needle, cache"):
        aligned = _loss(clock, files.after("ild"), text)
        evaluation = evaluate(
            load(files.after("kd")),
            AutoTokenizer.from_pretrained(TEACHER),
            text,
            teacher=load(TEACHER),
            window=WINDOW,
            batch_size=BATCH,
            needle=NEEDLE,
        )
        clock.console.print(render_table(evaluation))
    return aligned, evaluation


def _sample(clock: Clock, files: Files) -> Sample:
    with clock.phase("sample", "sample: both models go on from the same lines"):
        tokenizer = AutoTokenizer.from_pretrained(TEACHER)
        teacher, hybrid = (continuation(load(model), tokenizer) for model in (TEACHER, files.after("kd")))
        clock.console.print(PROMPT + hybrid, markup=False, highlight=False)
    return Sample(prompt=PROMPT, teacher=teacher, hybrid=hybrid)


def _write(report: QuickstartReport, plots: list[Path], files: Files, clock: Clock) -> None:
    (files.out / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_page(report, plots, files.out / "index.html")
    clock.console.rule("result", align="left")
    clock.console.print(
        f"held-out loss {report.loss_after_kd:.4f}, {report.loss_excess_percent:.1f} % over the teacher's "
        f"{report.teacher_loss:.4f}; cache {report.cache_percent:.2f} % of the teacher's per token\n"
        f"report: {files.out / 'report.json'}\npage:   {files.out / 'index.html'}"
    )
