"""What the stages of a recipe are to the formulas."""

from __future__ import annotations

from typing import Any

from hylo.config import HyloConfig
from hylo.distill.dry_run import teacher_config
from hylo.distill.layers import decoder_layers
from hylo.distill.models import meta_model
from hylo.distill.recipe import IldStage, Recipe
from hylo.distill.student import student_config
from hylo.distill.table import choose_trainable
from hylo.errors import UserError
from hylo.memory.counts import Counts, parameter_counts
from hylo.memory.training import Job


def stage_job(recipe: Recipe, index: int, *, gpus: int = 1, length: int | None = None, batch: int | None = None) -> Job:
    """One micro-batch of a stage on one of `gpus`.

    Args:
        index: of the stage, from 0.
        length, batch: tokens of a sequence and sequences of a forward pass, instead of the stage's.
    Raises:
        UserError: there is no such stage, or no formula for the student or the teacher.
    """
    if not 0 <= index < len(recipe.stages):
        raise UserError(f"there is no stage {index}: recipe '{recipe.name}' has stages 0 to {len(recipe.stages) - 1}")
    stage = recipe.stages[index]
    student = student_config(recipe, dry_run=True)
    if not isinstance(student, HyloConfig):
        raise UserError(f"no memory formula for a student of type '{student.model_type}', only for hybrids")
    teacher = teacher_config(recipe, stage)
    # Alignment has one layer's activations at a time and no head: neither key.
    whole = None if isinstance(stage, IldStage) else stage
    return Job(
        student=student,
        teacher=teacher,
        kind=stage.kind,
        batch=batch or min(stage.batch_size, -(-stage.sequences_per_step // gpus)),
        length=length or stage.sequence_length,
        accumulates=stage.gradient_accumulation > gpus,  # its passes are all GPUs' together
        half=recipe.precision == "bf16",
        checkpointing=False if whole is None else whole.activation_checkpointing,
        tile=stage.mlp_tile_tokens,
        chunk=1 if whole is None else whole.kl_chunk_tokens,
        trainable=trainable_counts(student, stage.trainable),
        gpus=gpus,
    )


def trainable_counts(config: HyloConfig, trainable: Any) -> Counts:
    """Parameters that get gradients: all by formula, those of a list of patterns by the names of the model."""
    if trainable == "all":
        return parameter_counts(config)
    model = meta_model(config)
    choose_trainable(model, trainable)

    def chosen(module: Any, matrices: bool | None = None) -> int:
        """Args: matrices: those of linear maps alone, or all others alone."""
        return sum(
            p.numel()
            for name, p in module.named_parameters()
            if p.requires_grad and matrices in (None, "_proj" in name)
        )

    layers = decoder_layers(model)
    return Counts(
        embedding=chosen(model.get_submodule("model.embed_tokens")),
        matrices=tuple(chosen(layer, True) for layer in layers),
        vectors=tuple(chosen(layer, False) for layer in layers),
        norm=chosen(model.get_submodule("model.norm")),
        head=0 if config.tie_word_embeddings else chosen(model.get_submodule("lm_head")),
    )
