"""`hylo evaluate` without the command line: directories in, a directory with report and plots out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hylo.atomic import atomic_directory
from hylo.errors import UserError
from hylo.evaluate.needle import CODE_NEEDLE, PROSE_NEEDLE, NeedleSettings
from hylo.evaluate.plots import write_plots
from hylo.evaluate.report import EvaluationReport, default_needle_lengths, evaluate, render_table
from hylo.text import read_utf8

NEEDLES = {"prose": PROSE_NEEDLE, "code": CODE_NEEDLE}


def evaluate_command(
    model_dir: Path,
    teacher_dir: Path | None,
    text_path: Path,
    out_dir: Path,
    *,
    window: int = 2048,
    batch_size: int = 1,
    needle: str | None = "prose",
    needle_lengths: tuple[int, ...] | None = None,
    needle_repeats: int = 4,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    console: Console | None = None,
) -> EvaluationReport:
    """Evaluate the checkpoint in `model_dir` beside `teacher_dir`; write `report.json` and PNG plots to `out_dir`.

    The tokenizer is the one saved in `model_dir`; one saved in `teacher_dir` must have the same vocabulary. `out_dir`
    appears complete or not at all.

    Args:
        window: tokens per window of the loss.
        needle: "prose" or "code", the form of the needle; None leaves the test out.
        needle_lengths: tokens; None takes an eighth to the whole of the window, less the answer's.
        dtype: of weights and activations; None takes the checkpoint's.
        console: where the table goes; None prints no table.
    Raises:
        UserError: a directory or the text is missing, the text is not UTF-8 or shorter than a window, `out_dir`
            exists, no space to write, and what `evaluate` refuses.
    """
    _check_paths(model_dir, teacher_dir, text_path, out_dir)
    text = read_utf8(text_path)
    settings = _needle_settings(needle, needle_lengths, needle_repeats, window, seed)
    tokenizer = _load_tokenizer(model_dir, teacher_dir)
    model = _load_model(model_dir, device, dtype)
    teacher = None if teacher_dir is None else _load_model(teacher_dir, device, dtype)
    names = (model_dir.resolve().name, "" if teacher_dir is None else teacher_dir.resolve().name)
    report = evaluate(
        model,
        tokenizer,
        text,
        teacher=teacher,
        window=window,
        batch_size=batch_size,
        needle=settings,
        names=names,
    )
    write_report(report, out_dir)
    if console is not None:
        console.print(render_table(report))
    return report


def write_report(report: EvaluationReport, out_dir: Path) -> None:
    """Write `report.json` and the plots to a new directory, complete or not at all."""
    _check_new(out_dir)  # again: an evaluation takes long enough for somebody else to take the name
    with atomic_directory(out_dir) as partial:
        (partial / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        write_plots(report, partial)


def _check_paths(model_dir: Path, teacher_dir: Path | None, text_path: Path, out_dir: Path) -> None:
    for role, path in (("model", model_dir), ("teacher", teacher_dir)):
        if path is not None and not (path / "config.json").is_file():
            state = "holds no config.json" if path.is_dir() else "does not exist"
            raise UserError(f"{role} directory '{path}' {state}")
    if not text_path.is_file():
        raise UserError(f"text file '{text_path}' does not exist")
    _check_new(out_dir)


def _check_new(out_dir: Path) -> None:
    if out_dir.exists():
        raise UserError(f"output directory '{out_dir}' exists already")


def _needle_settings(
    form: str | None, lengths: tuple[int, ...] | None, repeats: int, window: int, seed: int
) -> NeedleSettings | None:
    if form is None:
        return None
    if form not in NEEDLES:
        raise UserError(f"needle must be one of {', '.join(NEEDLES)}, got '{form}'")
    settings = NeedleSettings(lengths=lengths or (), repeats=repeats, template=NEEDLES[form], seed=seed)
    return settings if lengths else replace(settings, lengths=default_needle_lengths(window - settings.max_new_tokens))


def _load_tokenizer(model_dir: Path, teacher_dir: Path | None) -> Any:
    """The model's tokenizer; a teacher that comes with one must come with the same."""
    tokenizer = _load(AutoTokenizer, model_dir)
    if teacher_dir is not None and (teacher_dir / "tokenizer_config.json").is_file():
        theirs = _load(AutoTokenizer, teacher_dir)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"the tokenizers of '{model_dir}' and '{teacher_dir}' differ")
    return tokenizer


def _load_model(directory: Path, device: str, dtype: torch.dtype | None) -> Any:
    """A model from a local directory; a weight that is not in the files is an error, not a random start."""
    model, info = _load(AutoModelForCausalLM, directory, dtype=dtype or "auto", output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"cannot load '{directory}': {len(missing)} weights are missing, first '{missing[0]}'")
    return model.to(device)


def _load(auto_class: Any, directory: Path, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(directory, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load '{directory}': {' '.join(str(error).split())}") from error
