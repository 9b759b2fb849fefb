"""A recipe tried without weights, data or network: models on the meta device, tables, and the first batch's shape."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel

from hylo.distill.data import Batches
from hylo.distill.layers import layer_states
from hylo.distill.models import check_fit, load_teacher_config, meta_model, with_rope
from hylo.distill.recipe import CeStage, IldStage, KlStage, Recipe
from hylo.distill.student import student_config
from hylo.distill.table import choose_trainable, parameter_groups, parameter_table


def run_dry(recipe: Recipe, console: Console) -> None:
    """Build student and teachers as shapes, print each stage's table, and run its first micro-batch as shapes.

    Raises:
        UserError: configurations do not fit each other, the layer list or the stages' lengths.
    """
    config = student_config(recipe, dry_run=True)
    for stage in recipe.stages:
        config = with_rope(config, stage.rope)
        check_fit(stage, config, teacher_config(recipe, stage))
        student = meta_model(config)
        choose_trainable(student, stage.trainable)
        title = f"stage {stage.name} ({stage.kind}): teacher {recipe.teacher_of(stage) or 'none'}"
        console.print(parameter_table(title, parameter_groups(student)))
        shape = check_first_batch(stage, student, recipe.seed)
        console.print(f"first batch {list(shape)}, in {stage.gradient_accumulation} of {stage.batch_size} sequences")


def check_first_batch(stage: IldStage | KlStage | CeStage, student: PreTrainedModel, seed: int) -> tuple[int, int]:
    """Cut counted tokens into the stage's first batch and push one micro-batch through the student as shapes.

    Returns:
        Shape of the batch of one optimiser step: sequences, tokens in each.
    """
    count, length = stage.sequences_per_step, stage.sequence_length
    tokens = np.arange(count * length, dtype=np.uint32) % student.config.vocab_size
    batch = Batches(tokens, length=length, sequences_per_step=count, seed=seed).batch(0)
    first = batch.split(stage.batch_size)[0]
    *_, last = layer_states(student, first.to("meta"))
    hidden = last.output
    expected = (stage.batch_size, length, student.config.hidden_size)
    if tuple(batch.shape) != (count, length) or tuple(hidden.shape) != expected:
        raise RuntimeError(f"a batch {tuple(batch.shape)} gave hidden states {tuple(hidden.shape)}, not {expected}")
    return count, length


def teacher_config(recipe: Recipe, stage: IldStage | KlStage | CeStage) -> PreTrainedConfig | None:
    """The configuration of a stage's teacher, out of the recipe's `dry_run` block if it is there; None without one."""
    source = recipe.teacher_of(stage)
    if source is None:
        return None
    upcycled = recipe.student.upcycle
    if upcycled is not None and source == upcycled.base and recipe.dry_run.base_config is not None:
        return load_teacher_config(recipe.dry_run.base_config, stage)
    if source == recipe.teacher and recipe.dry_run.teacher_config is not None:
        return load_teacher_config(recipe.dry_run.teacher_config, stage)
    return load_teacher_config(source, stage)
