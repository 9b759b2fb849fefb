"""Loading of students, teachers and tokenizers, with every fault of the files told in one sentence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hylo.distill.processes import local_number, process_count
from hylo.distill.recipe import CeStage, IldStage, KlStage, Recipe, Rope
from hylo.errors import UserError

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """The device of a recipe's `device`; "auto" is the GPU where there is one. Of several, each process's is its own.

    Raises:
        UserError: "cuda" without a GPU, or more processes on this host than it has GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("the recipe says 'device: cuda' but no CUDA GPU is available")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if process_count() == 1:
        return torch.device("cuda")
    if local_number() >= torch.cuda.device_count():
        raise UserError(f"process {local_number()} of this host needs a GPU and there are {torch.cuda.device_count()}")
    torch.cuda.set_device(local_number())
    return torch.device("cuda", local_number())


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = _read("tokenizer", source, AutoTokenizer.from_pretrained)
    # A tokenizer warns about texts longer than its model; packing cuts them afterwards.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def load_config(source: str | dict[str, Any], role: str) -> PreTrainedConfig:
    """Configuration of a directory or hub id, or out of the keys of a config.json."""
    if isinstance(source, str):
        config: PreTrainedConfig = _read(role, source, AutoConfig.from_pretrained)
        return config
    values = dict(source)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{role} configuration has no 'model_type'")
    built: PreTrainedConfig = _read(role, model_type, lambda kind: AutoConfig.for_model(kind, **values))
    return built


def load_teacher_config(source: str | dict[str, Any], stage: IldStage | KlStage | CeStage) -> PreTrainedConfig:
    """`load_config` of a stage's teacher, with the positions that the stage gives it."""
    rope = stage.teacher_rope if isinstance(stage, KlStage) else None
    return with_rope(load_config(source, "teacher"), rope)


def load_model(
    source: str, role: str, *, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """A causal LM with every weight from the files.

    Raises:
        UserError: files are missing, truncated or of another shape, or a weight of the model is in none of them.
    """
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if config is not None:
        options["config"] = config
    loaded: Any = _read(role, source, lambda where: AutoModelForCausalLM.from_pretrained(where, **options))
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{role} '{source}' lacks the weight '{sorted(info['missing_keys'])[0]}'")
    result: PreTrainedModel = model
    return result


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model as shapes, with no memory behind them."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def check_same_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, student: PreTrainedConfig) -> None:
    """Student, teachers and tokenizer must mean the same token by the same id.

    Raises:
        UserError: the tokenizer has more tokens than the student, or a teacher's tokenizer is at hand and gives a
            token another id.
    """
    if len(tokenizer) > student.vocab_size:
        raise UserError(f"tokenizer has {len(tokenizer)} tokens but the student's vocabulary only {student.vocab_size}")
    for source in teachers(recipe):
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").exists():
            _compare_tokens(tokenizer, load_tokenizer(source), source)


def check_fit(stage: IldStage | KlStage | CeStage, student: PreTrainedConfig, teacher: PreTrainedConfig | None) -> None:
    """Check one stage's configurations against each other.

    Raises:
        UserError: sequences are longer than a position table, vocabularies differ in size, or, for layer-wise
            alignment, depth or width differ.
    """
    _check_positions(stage, student, "student")
    if teacher is None:
        return
    _check_positions(stage, teacher, "teacher")
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher of stage '{stage.name}' has a vocabulary of {teacher.vocab_size} and the student one of "
            f"{student.vocab_size}: distillation needs the same vocabulary"
        )
    for name in ("num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if isinstance(stage, IldStage) and ours != theirs:
            raise UserError(
                f"stage '{stage.name}' aligns layers, but {name} of teacher and student are {theirs} and {ours}"
            )


def teachers(recipe: Recipe) -> list[str]:
    """Every teacher that some stage uses, each once."""
    named = (recipe.teacher_of(stage) for stage in recipe.stages)
    return list(dict.fromkeys(source for source in named if source is not None))


def with_rope(config: PreTrainedConfig, rope: Rope | None) -> PreTrainedConfig:
    """`config` with another position encoding and the same theta; None changes nothing."""
    if rope is None:
        return config
    config = copy.deepcopy(config)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    if rope.factor != 1:
        config.rope_parameters |= {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    if rope.max_position_embeddings is not None:
        config.max_position_embeddings = rope.max_position_embeddings
    return config


def _check_positions(stage: IldStage | KlStage | CeStage, config: PreTrainedConfig, role: str) -> None:
    limit = config.max_position_embeddings
    if stage.sequence_length > limit:
        raise UserError(
            f"stage '{stage.name}' has sequence_length {stage.sequence_length}, longer than the {role}'s "
            f"max_position_embeddings {limit}"
        )


def _compare_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, source: str) -> None:
    vocabulary = theirs.get_vocab()
    for token, number in sorted(ours.get_vocab().items(), key=lambda item: item[1]):
        if vocabulary.get(token) != number:
            raise UserError(
                f"teacher '{source}' gives the token {token!r} the id {vocabulary.get(token)}, "
                f"the student's tokenizer {number}: distillation needs the same vocabulary"
            )


def _read(role: str, source: str, load: Callable[[str], T]) -> T:
    """Run a loader; what is wrong with the user's files becomes a UserError, anything else stays."""
    try:
        return load(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        if isinstance(error, torch.OutOfMemoryError | UserError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load {role} '{source}': {reason[:300]}") from error
