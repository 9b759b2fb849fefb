"""The student a run starts from: a saved model, an upcycled base, or two aligned models put together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hylo.atomic import atomic_directory
from hylo.config import HyloConfig
from hylo.distill.models import load_config, load_tokenizer, with_rope
from hylo.distill.recipe import Recipe, Student, Upcycle
from hylo.errors import UserError
from hylo.upcycle import assemble, assembled_config, hybrid_config, upcycle
from hylo.upcycle.base import base_directory, load_base_config


def student_sources(student: Student) -> list[str]:
    """Directories or hub ids that the student is made from; the tokenizer is the first one's."""
    if student.upcycle is not None:
        return [student.upcycle.base]
    if student.assemble is not None:
        return [student.assemble.mla, student.assemble.linear]
    assert student.path is not None
    return [student.path]


def student_config(recipe: Recipe, *, dry_run: bool = False) -> PreTrainedConfig:
    """The first student's configuration, without its weights.

    Args:
        dry_run: take the base's from the recipe's `dry_run` block if it is there.
    """
    upcycle_block, assemble_block = recipe.student.upcycle, recipe.student.assemble
    if upcycle_block is not None:
        given = recipe.dry_run.base_config if dry_run else None
        base = load_base_config(base_directory(upcycle_block.base)) if given is None else load_config(given, "base")
        return hybrid_config(base, **_settings(upcycle_block, base))
    if assemble_block is not None:
        mla, linear = _hybrid_config(assemble_block.mla), _hybrid_config(assemble_block.linear)
        return assembled_config(mla, linear, assemble_block.mla_layers)
    return load_config(student_sources(recipe.student)[0], "student")


def make_student(recipe: Recipe, output: Path) -> Path:
    """Directory of the first stage's student, made under `output` unless the recipe names a saved model."""
    student, target = recipe.student, output / "student"
    if student.path is not None:
        return Path(student.path)
    if target.exists():
        return target
    if student.upcycle is not None:
        block = student.upcycle
        base = load_base_config(base_directory(block.base))
        upcycle(block.base, out=target, init=block.init, seed=recipe.seed, **_settings(block, base))
    elif student.assemble is not None:
        parts = student.assemble
        hybrid = assemble(parts.mla, parts.linear, parts.mla_layers)
        with atomic_directory(target) as partial:
            hybrid.save_pretrained(partial)
            load_tokenizer(parts.mla).save_pretrained(partial)
    return target


def _settings(block: Upcycle, base: PreTrainedConfig) -> dict[str, Any]:
    """Mixer, layers, position encoding and the dims that the recipe gives, as keywords of `hylo.upcycle`."""
    settings = block.model_dump(exclude={"base", "init", "rope"}, exclude_none=True)
    if block.rope is not None:
        turned = with_rope(base, block.rope)
        settings["rope_parameters"] = turned.rope_parameters
        settings["max_position_embeddings"] = turned.max_position_embeddings
    return settings


def _hybrid_config(source: str) -> HyloConfig:
    config = load_config(source, "student")
    if not isinstance(config, HyloConfig):
        raise UserError(f"'{source}' is a {config.model_type} model; only hybrids are assembled")
    return config
