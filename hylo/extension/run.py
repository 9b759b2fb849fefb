"""Books to teacher to hybrids to long hybrids, measured before and after: every part is done once and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from hylo.atomic import atomic_directory, write_text_atomically
from hylo.distill import Recipe, run_recipe
from hylo.distill.models import resolve_device
from hylo.distill.output import decisive
from hylo.errors import UserError
from hylo.evaluate.needle import NeedleMode
from hylo.extension.books import Books, unpack
from hylo.extension.measure import Numbers, measure
from hylo.extension.plots import write_extension_plots
from hylo.extension.recipe import Extension
from hylo.extension.report import ExtensionReport, HybridReport, StageRecord, hybrid_report
from hylo.quickstart.measure import stage_rows, stage_seconds
from hylo.quickstart.report import versions
from hylo.quickstart.run import Clock
from hylo.quickstart.tokenizer import train_tokenizer
from hylo.quickstart.train_teacher import save_random
from hylo.text import read_utf8

_RECORD = "extension.json"
_BOTH: tuple[NeedleMode, ...] = ("likelihood", "generation")


def run_extension(extension: Extension, *, resume: bool = False, console: Console | None = None) -> ExtensionReport:
    """Train the teacher, make and train the hybrids, measure all; report.json and plots are in the output directory.

    Args:
        resume: go on with this recipe's unfinished run; without one it starts afresh.
    Raises:
        UserError: the output directory exists and `resume` is off, or it holds another recipe's run; or anything of
            the text, the models or the stages does not fit.
        SystemExit: 143 after SIGTERM in a stage, with its state saved.
    """
    disable_progress_bar()
    clock = Clock(console or Console())
    recipes = {"teacher": extension.teacher_recipe()}
    recipes |= {name: extension.hybrid_recipe(name) for name in extension.hybrids}  # faults of all before the first
    _own(extension, resume)
    with clock.phase("text", "text, tokenizer and a teacher that has learned nothing"):
        books = unpack(extension.text)
        _random_teacher(extension, books)
    for name, recipe in recipes.items():
        with clock.phase(name, f"train: {name}"):
            run_recipe(recipe, resume=Path(recipe.output).exists(), console=clock.console)
    with clock.phase("evaluation", "evaluate: loss by position and needles, before and after"):
        report = _report(extension, books, recipes, clock)
    write_text_atomically(extension.root / "report.json", report.model_dump_json(indent=2) + "\n")
    plots = write_extension_plots(report, extension.root)
    _tell(report, plots, clock.console)
    return report


def _own(extension: Extension, resume: bool) -> None:
    """Make the output directory this recipe's, or refuse it."""
    record, identity = extension.root / _RECORD, extension.model_dump_json()
    if extension.root.exists():
        if not resume:
            raise UserError(f"output directory '{extension.output}' exists; --resume continues the run in it")
        if not record.is_file() or _decisive(record.read_text(encoding="utf-8")) != _decisive(identity):
            raise UserError(f"output directory '{extension.output}' holds another run than this recipe's")
    extension.root.mkdir(parents=True, exist_ok=True)
    write_text_atomically(record, identity)


def _decisive(identity: str) -> dict[str, Any]:
    """Of a recipe as JSON, what decides the results."""
    values = json.loads(identity)
    teacher = values["teacher"] | {"stages": decisive(values["teacher"]["stages"])}
    return values | {"teacher": teacher, "stages": decisive(values["stages"])}


def _random_teacher(extension: Extension, books: Books) -> None:
    target = extension.root / "random"
    if target.exists():
        return
    tokenizer = train_tokenizer((read_utf8(path) for path in books.train), extension.text.vocabulary)
    config = teacher_config(extension, tokenizer)
    with atomic_directory(target) as partial:
        save_random(config, tokenizer, partial)


def teacher_config(extension: Extension, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The teacher's shape; vocabulary and special tokens are the tokenizer's."""
    return LlamaConfig(
        **extension.teacher.model,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _report(extension: Extension, books: Books, recipes: dict[str, Recipe], clock: Clock) -> ExtensionReport:
    text = books.held_out_text()
    teacher = _measured(extension, "teacher", extension.teacher_model, text, ("likelihood",), clock.console)
    hybrids = {name: _hybrid(extension, name, recipes[name], text, clock.console) for name in extension.hybrids}
    device = resolve_device(extension.device)
    return ExtensionReport(
        name=extension.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=extension.precision,
        short_window=extension.evaluation.short_window,
        long_window=extension.evaluation.long_window,
        vocabulary=AutoConfig.from_pretrained(extension.teacher_model).vocab_size,
        train_bytes=sum(path.stat().st_size for path in books.train),
        held_out_bytes=sum(path.stat().st_size for path in books.held_out),
        teacher_parameters=_parameters(extension.teacher_model),
        teacher_stages=_stages(recipes["teacher"]),
        teacher=teacher,
        hybrids=hybrids,
        seconds={phase: round(seconds, 1) for phase, seconds in clock.seconds.items()},
        versions=versions(),
    )


def _hybrid(extension: Extension, name: str, recipe: Recipe, text: str, console: Console) -> HybridReport:
    short, long = extension.hybrid_model(name, extension.short), extension.hybrid_model(name, extension.stages[-1].name)
    return hybrid_report(
        extension.evaluation,
        _measured(extension, f"{name}-before", short, text, ("likelihood",), console),
        _measured(extension, f"{name}-after", long, text, _BOTH, console),
        mixer_types=AutoConfig.from_pretrained(long).mixer_types,
        parameters=_parameters(long),
        stages=_stages(recipe),
    )


def _measured(
    extension: Extension, name: str, directory: Path, text: str, modes: Sequence[NeedleMode], console: Console
) -> Numbers:
    """The numbers of one model, measured once and kept in evaluation/`name`.json."""
    kept = extension.root / "evaluation" / f"{name}.json"
    if kept.exists():
        return Numbers.model_validate_json(kept.read_text(encoding="utf-8"))
    dtype = torch.bfloat16 if extension.precision == "bf16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    numbers = measure(model.to(resolve_device(extension.device)), tokenizer, text, extension.evaluation, modes)
    kept.parent.mkdir(exist_ok=True)
    write_text_atomically(kept, numbers.model_dump_json(indent=2) + "\n")
    needles = ", ".join(f"{n:,}: {s:.0%}" for n, s in _by_length(numbers, modes[-1]))
    console.print(f"{name}: {numbers.short.loss:.4f} nats per token; needle by {modes[-1]} {needles}")
    return numbers


def _by_length(numbers: Numbers, mode: NeedleMode) -> list[tuple[int, float]]:
    grid = numbers.needle[mode]
    return list(zip(grid.lengths, grid.by_length, strict=True))


def _parameters(directory: Path) -> int:
    """Of a saved model, shapes alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return sum(parameter.numel() for parameter in model.parameters())


def _stages(recipe: Recipe) -> dict[str, StageRecord]:
    return {stage.name: _stage(Path(recipe.output) / "log.jsonl", stage.name) for stage in recipe.stages}


def _stage(log: Path, name: str) -> StageRecord:
    rows = stage_rows(log, name)
    last = rows[-1]
    seconds = round(stage_seconds(rows), 1)
    return StageRecord(steps=last["step"], tokens=last["tokens"], seconds=seconds, last_loss=last["loss"])


def _tell(report: ExtensionReport, plots: Sequence[Path], console: Console) -> None:
    console.rule("result", align="left")
    for name, one in report.hybrids.items():
        kept = ", ".join(f"{mode} {r.longest:.0%} of {r.within:.0%} within" for mode, r in one.needle.items())
        console.print(
            f"{name}: needle at the longest: {kept}; short-context loss {one.short_loss_percent:+.1f} %; "
            f"loss of the last positions {one.flat_percent:+.1f} %; bars met: {one.met}"
        )
    console.print("written: report.json, " + ", ".join(path.name for path in plots))
