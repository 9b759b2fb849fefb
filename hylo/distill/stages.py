"""A whole run: checks first, then the student, then the stages in order, each from the result of the one before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hylo.atomic import atomic_directory, remove_directory
from hylo.distill.data import Batches, Packed, pack
from hylo.distill.dry_run import run_dry
from hylo.distill.engine import StageJob, last_step, train_stage
from hylo.distill.log import LOG_FILE, StageLog, open_board, rewind_log
from hylo.distill.models import (
    check_fit,
    check_same_tokens,
    load_config,
    load_model,
    load_teacher_config,
    load_tokenizer,
    meta_model,
    resolve_device,
    teachers,
    with_rope,
)
from hylo.distill.out_of_memory import enough_memory
from hylo.distill.output import is_finished, owned_output, result_directory, run_identity
from hylo.distill.processes import from_first, joined, on_first, process_count, process_number
from hylo.distill.recipe import CeStage, IldStage, KlStage, Recipe, load_recipe
from hylo.distill.shards import place_model, whole_state
from hylo.distill.student import make_student, student_config, student_sources
from hylo.distill.table import choose_trainable, parameter_groups, parameter_table
from hylo.errors import UserError
from hylo.upcycle.base import check_weight_files


@dataclass(frozen=True)
class Plan:
    """A recipe checked against its models and data, before anything is written."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batches]
    steps: list[int]
    device: torch.device
    data_key: str

    def checkpoints(self, index: int) -> Path:
        return Path(self.recipe.output) / self.recipe.stages[index].name / "checkpoints"


def run_recipe(
    recipe: Recipe | str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    steps: int | None = None,
    steps_scale: float | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Path | None:
    """Run every stage of a recipe.

    Args:
        recipe: a Recipe, or the path of a YAML file.
        resume: continue this recipe's own unfinished run; without one it starts afresh.
        dry_run: build the models without weights, print the tables, check the first batch, write nothing.
        steps: optimiser steps of every stage, instead of the recipe's.
        steps_scale: factor on the recipe's steps of every stage.
        overrides: "key.subkey=value" changes to a recipe given as a path.
    Returns:
        Directory of the last stage's model (Hugging Face layout); None for a dry run.
    Raises:
        UserError: anything in the recipe, its files or its output directory does not fit; nothing was written.
        SystemExit: 143 after SIGTERM, with the state saved.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides=overrides)
    elif overrides:
        raise UserError("overrides belong to a recipe given as a path")
    console = console or Console()
    if dry_run:
        run_dry(recipe, console)
        return None
    with joined(recipe.device), _one_progress_bar():
        identity = run_identity(recipe, steps, steps_scale)
        if from_first(on_first(lambda: is_finished(recipe, identity, resume=resume))):
            return result_directory(recipe, -1)
        plan = make_plan(recipe, steps, steps_scale)
        return _run(plan, identity | {"data": plan.data_key}, console if process_number() == 0 else Console(quiet=True))


def _run(plan: Plan, identity: dict[str, Any], console: Console) -> Path:
    """Run the plan's stages in the directory that is then this run's own."""
    recipe, output = plan.recipe, Path(plan.recipe.output)
    with ExitStack() as owned:  # in the first process; the others write nothing
        on_first(lambda: owned.enter_context(owned_output(output, identity)))
        board = on_first(lambda: open_board(output / "tensorboard", recipe.tensorboard))
        student = from_first(on_first(lambda: make_student(recipe, output)))
        assert student is not None
        return run_stages(plan, student, board, console)


def make_plan(recipe: Recipe, steps: int | None, scale: float | None) -> Plan:
    """Check recipe, models and data against each other and cut the data into batches."""
    device = resolve_device(recipe.device)
    tokenizer = check_models(recipe)
    packed = _pack_stages(recipe, tokenizer)
    batches = [
        Batches(
            one.tokens,
            length=stage.sequence_length,
            sequences_per_step=stage.sequences_per_step,
            seed=recipe.seed,
            fraction=stage.data_fraction,
        )
        for stage, one in zip(recipe.stages, packed, strict=True)
    ]
    for stage in recipe.stages:
        _check_shares(stage)
    counts = [
        steps or _scaled(stage_steps(stage, one.sequences), scale)
        for stage, one in zip(recipe.stages, batches, strict=True)
    ]
    keys = dict.fromkeys(one.key for one in packed)
    return Plan(recipe, tokenizer, batches, counts, device, ",".join(keys))


def _pack_stages(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Packed]:
    """The tokens of every stage; those that the stages share are read once."""
    shared = pack(recipe.data, tokenizer)
    return [shared if one.sources is None else pack(recipe.data_of(one), tokenizer) for one in recipe.stages]


def _check_shares(stage: IldStage | KlStage | CeStage) -> None:
    if stage.sequences_per_step % process_count():
        raise UserError(
            f"stage '{stage.name}' has {stage.sequences_per_step} sequences in a step (batch_size * "
            f"gradient_accumulation), which {process_count()} processes cannot share evenly"
        )


def check_models(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Check every model the run will load, as far as configurations and file headers tell; returns the tokenizer."""
    config = student_config(recipe)
    for stage in recipe.stages:
        config = with_rope(config, stage.rope)
        teacher = recipe.teacher_of(stage)
        check_fit(stage, config, None if teacher is None else load_teacher_config(teacher, stage))
        if stage.trainable != "all":
            choose_trainable(meta_model(config), stage.trainable)
    for source in [*student_sources(recipe.student), *teachers(recipe)]:
        if Path(source).is_dir():  # a hub id is checked when it is fetched
            check_weight_files(Path(source))
    tokenizer = load_tokenizer(recipe.data.tokenizer or student_sources(recipe.student)[0])
    check_same_tokens(recipe, tokenizer, config)
    return tokenizer


def stage_steps(stage: IldStage | KlStage | CeStage, sequences: int) -> int:
    """Optimiser steps of a stage, given the sequences in one epoch of its share of the data."""
    if stage.steps is not None:
        return stage.steps
    if stage.tokens is not None:
        return math.ceil(stage.tokens / (stage.sequences_per_step * stage.sequence_length))
    assert stage.epochs is not None
    return max(1, int(stage.epochs * sequences / stage.sequences_per_step))


def run_stages(plan: Plan, student: Path, board: Any, console: Console) -> Path:
    """Run the stages that have no result yet, in order; returns the last result."""
    for index in range(len(plan.recipe.stages)):
        result = result_directory(plan.recipe, index)
        if not from_first(result.exists()):
            on_first(partial(_rewind, plan, index))
            _run_stage(plan, index, student, board, console)
        on_first(partial(_drop_checkpoints, plan.checkpoints(index)))
        student = result
    return student


def _rewind(plan: Plan, index: int) -> None:
    """Drop from the log what the stage is about to do again."""
    recipe = plan.recipe
    earlier = [stage.name for stage in recipe.stages[:index]]
    rewind_log(Path(recipe.output) / LOG_FILE, earlier, recipe.stages[index].name, last_step(plan.checkpoints(index)))


def _drop_checkpoints(checkpoints: Path) -> None:
    if checkpoints.exists():
        remove_directory(checkpoints)


def _run_stage(plan: Plan, index: int, origin: Path, board: Any, console: Console) -> None:
    recipe, stage = plan.recipe, plan.recipe.stages[index]
    config = with_rope(load_config(str(origin), "student"), stage.rope)
    student = load_model(str(origin), "student", dtype=torch.float32, config=config)
    choose_trainable(student, stage.trainable)
    teacher = recipe.teacher_of(stage) or "none"
    title = f"stage {stage.name} ({stage.kind}): {plan.steps[index]} steps, teacher {teacher}"
    console.print(parameter_table(title, parameter_groups(student)))

    def open_log(start: int) -> StageLog:
        return StageLog(
            Path(recipe.output) if process_number() == 0 else None,
            stage.name,
            steps=plan.steps[index],
            start=start,
            tokens_per_step=stage.sequences_per_step * stage.sequence_length,
            board=board,
            console=console,
        )

    with enough_memory(stage, plan.checkpoints(index)):
        train_stage(_job(plan, index, student), open_log)
    weights = whole_state(student)
    on_first(lambda: _save_result(plan, index, student, weights))


def _save_result(plan: Plan, index: int, student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    with atomic_directory(result_directory(plan.recipe, index)) as directory:
        student.save_pretrained(directory, state_dict=weights)
        plan.tokenizer.save_pretrained(directory)


def _job(plan: Plan, index: int, student: PreTrainedModel) -> StageJob:
    recipe, stage = plan.recipe, plan.recipe.stages[index]
    return StageJob(
        stage=stage,
        student=place_model(student, plan.device),
        teacher=_load_teacher(recipe, stage, plan.device),
        batches=plan.batches[index],
        steps=plan.steps[index],
        checkpoints=plan.checkpoints(index),
        keep_checkpoints=recipe.keep_checkpoints,
        seed=recipe.seed,
        bf16=recipe.precision == "bf16",
        device=plan.device,
    )


def _load_teacher(recipe: Recipe, stage: IldStage | KlStage | CeStage, device: torch.device) -> nn.Module | None:
    source = recipe.teacher_of(stage)
    if source is None:
        return None
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    config = load_teacher_config(source, stage)
    teacher = load_model(source, "teacher", dtype=dtype, config=config).eval().requires_grad_(False)
    return place_model(teacher, device)


def _scaled(steps: int, scale: float | None) -> int:
    return steps if scale is None else max(1, round(steps * scale))


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """Silence the bars that transformers draws while it reads and writes weights: the run has its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
