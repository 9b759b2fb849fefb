"""The recipe of a distillation run: one YAML file, checked strictly before anything is built or written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hylo.distill.recipe_file import UniqueKeyLoader, read_recipe_file
from hylo.errors import UserError

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
RESERVED = ("student", "tensorboard", "run.json", "log.jsonl")  # other entries of the output directory
Checkpointing = Literal[False, True, "selective"]  # of whole layers; selective but for attention
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """Unknown keys and non-finite numbers are errors; a loaded recipe never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _exactly_one(model: BaseModel, names: Sequence[str], what: str) -> None:
    given = [name for name in names if getattr(model, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{what} needs exactly one of {', '.join(names)}, got {', '.join(given) or 'none'}")


class Rope(Strict):
    """Position encoding: YaRN by `factor` over the original window; factor 1 is plain rotation."""

    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: PositiveInt
    max_position_embeddings: PositiveInt | None = None


class UpcycleSettings(Strict):
    """What a base is turned into; every rank and width left out follows the base (docs/upcycling.md)."""

    mixer: Literal["gated_deltanet", "mamba2"]
    mla_layers: list[Annotated[int, Field(ge=0)]]
    init: Literal["published", "aligned"] = "published"
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt | None = None
    qk_nope_head_dim: Annotated[int, Field(ge=0)] | None = None
    qk_rope_head_dim: Annotated[int, Field(ge=0)] | None = None
    v_head_dim: PositiveInt | None = None
    linear_num_heads: PositiveInt | None = None
    linear_key_head_dim: PositiveInt | None = None
    linear_value_head_dim: PositiveInt | None = None
    rope: Rope | None = None


class Upcycle(UpcycleSettings):
    """Student built from a pretrained base."""

    base: str


class Assemble(Strict):
    """Student put together from two aligned models: layer i from `mla` where listed, else from `linear`."""

    mla: str
    linear: str
    mla_layers: list[Annotated[int, Field(ge=0)]]


class Student(Strict):
    """Where the student comes from: exactly one of a saved model, an upcycled base, or two models assembled."""

    path: str | None = None
    upcycle: Upcycle | None = None
    assemble: Assemble | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Student:
        _exactly_one(self, ("path", "upcycle", "assemble"), "student")
        return self


class Pattern(Strict):
    """How a fact is told and how it is asked for, answer included; both texts hold `{key}` and `{value}`."""

    fact: str
    question: str

    @model_validator(mode="after")
    def _both_filled_in(self) -> Pattern:
        for text in (self.fact, self.question):
            if {name for _, name, _, _ in Formatter().parse(text) if name is not None} != {"key", "value"}:
                raise ValueError(f"a pattern needs {{key}} and {{value}} and no other braces, got {text!r}")
        return self


class Recall(Strict):
    """New documents in place of a source's own: stretches of its text with facts told in them and asked for later.

    Every `spacing` words (a half to one and a half times as many, drawn) comes a fact or a question, the question
    about any fact of the last `reach` words with equal chance. A key is one of the `keys` most frequent words of the
    text but those of `avoid`, and never that of another fact within reach; a value is a number of `digits` digits.
    """

    documents: PositiveInt
    words: PositiveInt
    spacing: Annotated[int, Field(ge=2)]
    reach: PositiveInt
    patterns: Annotated[list[Pattern], Field(min_length=1)]
    keys: PositiveInt = 4000
    avoid: list[str] = []
    digits: PositiveInt = 5
    seed: Annotated[int, Field(ge=0)] = 0


class Source(Strict):
    """Documents: text files (a path or glob), a JSONL file, or a Hugging Face dataset.

    `separator` splits a text file into documents; without it a file is one. `field` is the key that holds a
    string, or a chat as a list of {role, content} that the tokenizer's chat template turns into text. `recall` makes
    other documents out of these.
    """

    text: str | None = None
    jsonl: str | None = None
    dataset: str | None = None
    separator: Annotated[str, Field(min_length=1)] | None = None
    field: str = "text"
    subset: str | None = None
    split: str = "train"
    recall: Recall | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Source:
        _exactly_one(self, ("text", "jsonl", "dataset"), "a data source")
        if self.separator is not None and self.text is None:
            raise ValueError("separator belongs to text sources")
        return self


class Data(Strict):
    """Training text: its sources, the tokenizer (default: the student's) and where packed tokens are kept."""

    sources: Annotated[list[Source], Field(min_length=1)]
    exclude: list[str] = []
    tokenizer: str | None = None
    cache_dir: str | None = None


class StageBase(Strict):
    """What every kind of stage has. Sequences per optimiser step: batch_size * gradient_accumulation.

    `sources` are those of the stage alone, in place of the run's.
    """

    name: StageName
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    sequence_length: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt
    gradient_accumulation: PositiveInt = 1
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    data_fraction: Fraction = 1.0
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    trainable: Literal["all"] | Annotated[list[str], Field(min_length=1)] = "all"
    rope: Rope | None = None
    mlp_tile_tokens: PositiveInt | None = None
    checkpoint_every: PositiveInt = 500
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _one_length(self) -> StageBase:
        _exactly_one(self, ("steps", "tokens", "epochs"), f"stage '{self.name}'")
        return self

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation


class IldStage(StageBase):
    """Layer-wise alignment with teacher forcing; the teacher is the base unless named otherwise."""

    kind: Literal["ild"]
    teacher: str | None = None
    mixer_weight: Annotated[float, Field(ge=0)] = 1.0


class KlStage(StageBase):
    """Distillation of the teacher's next-token distribution, with `ce_weight` times the text's own beside it.

    `teacher_rope` is for a teacher whose own window is shorter than the stage's sequences.
    """

    kind: Literal["kl"]
    teacher: str | None = None
    teacher_rope: Rope | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    kl_chunk_tokens: PositiveInt = 4096
    activation_checkpointing: Checkpointing = False


class CeStage(StageBase):
    """Plain language modelling, no teacher."""

    kind: Literal["ce"]
    kl_chunk_tokens: PositiveInt = 4096
    activation_checkpointing: Checkpointing = False


Stage = Annotated[IldStage | KlStage | CeStage, Field(discriminator="kind")]


class DryRun(Strict):
    """Configurations that only a dry run reads, so that it needs neither weights nor a network.

    Each is a directory with a config.json, or the keys of such a file ("model_type" among them).
    """

    base_config: str | dict[str, Any] | None = None
    teacher_config: str | dict[str, Any] | None = None


class Recipe(Strict):
    """A whole run: student, teacher, data and an ordered list of stages, each starting from the one before.

    `output` is runs/NAME where none is given.
    """

    name: StageName
    output: str
    student: Student
    data: Data
    stages: Annotated[list[Stage], Field(min_length=1)]
    teacher: str | None = None
    seed: Annotated[int, Field(ge=0)] = 42
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep_checkpoints: PositiveInt = 2
    tensorboard: bool = False
    dry_run: DryRun = DryRun()

    @model_validator(mode="before")
    @classmethod
    def _output_by_name(cls, values: Any) -> Any:
        return (
            {"output": f"runs/{values['name']}"} | values if isinstance(values, dict) and "name" in values else values
        )

    @model_validator(mode="after")
    def _distinct_stages_with_teachers(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1 or name in RESERVED:
                raise ValueError(f"stage name '{name}' is taken: names differ and none is of {', '.join(RESERVED)}")
        for stage in self.stages:
            if stage.kind != "ce" and self.teacher_of(stage) is None:
                raise ValueError(f"stage '{stage.name}' of kind {stage.kind} has no teacher")
        return self

    def teacher_of(self, stage: IldStage | KlStage | CeStage) -> str | None:
        """The stage's own teacher; for ILD then the upcycled base; then the recipe's teacher. None for 'ce'."""
        if isinstance(stage, CeStage):
            return None
        if stage.teacher is None and isinstance(stage, IldStage) and self.student.upcycle is not None:
            return self.student.upcycle.base
        return stage.teacher or self.teacher

    def data_of(self, stage: IldStage | KlStage | CeStage) -> Data:
        """The stage's own sources where it names some, else the run's; tokenizer and the rest are the run's."""
        return self.data if stage.sources is None else self.data.model_copy(update={"sources": stage.sources})

    def plain(self) -> dict[str, Any]:
        """What a run is made of, as JSON values: `output.decisive` tells what of the stages decides the result."""
        beside: dict[str, Any] = {"output": True, "dry_run": True, "keep_checkpoints": True, "data": {"cache_dir"}}
        return self.model_dump(mode="json", exclude=beside)


def parse_recipe(values: Any, *, origin: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check a mapping against the recipe's schema; the first fault becomes one sentence.

    Args:
        values: what a YAML file holds.
        origin: named in the message.
        overrides: "a.b.0.c=value" each, the value in YAML; applied before the check.
    Raises:
        UserError: a key is unknown or missing, or a value does not fit; the message quotes both.
    """
    return parse_strict(Recipe, values, origin=origin, overrides=overrides)


def load_recipe(path: str | Path, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a YAML recipe, with what it extends. Paths inside it are relative to the working directory.

    Raises:
        UserError: a file cannot be read, is not YAML, or the whole does not fit the schema.
    """
    return load_strict(Recipe, Path(path), overrides=overrides)


def parse_strict(kind: type[M], values: Any, *, origin: str, overrides: Sequence[str] = ()) -> M:
    """`parse_recipe` for a schema of any kind."""
    if not isinstance(values, dict):
        raise UserError(f"{origin}: a recipe is a mapping of keys to values, got {values!r}")
    for override in overrides:
        _apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{origin}: {_sentence(error)}") from None


def load_strict(kind: type[M], path: Path, *, overrides: Sequence[str] = ()) -> M:
    """`load_recipe` for a schema of any kind."""
    return parse_strict(kind, read_recipe_file(path), origin=f"recipe '{path}'", overrides=overrides)


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"override '{override}' is not of the form key.subkey=value")
    node: Any = values
    try:
        for key in keys[:-1]:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        last = keys[-1]
        node[int(last) if isinstance(node, list) else last] = yaml.load(text, Loader=UniqueKeyLoader)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError):
        raise UserError(f"override '{override}' names no key of the recipe") from None
    except yaml.YAMLError:
        raise UserError(f"override '{override}' has a value that is not YAML") from None


def _sentence(error: ValidationError) -> str:
    """The first fault in one sentence that quotes key and value."""
    fault = error.errors(include_url=False)[0]
    # A discriminated union puts its tag into the location; the reader's file has no such key.
    parts = [str(p) for i, p in enumerate(fault["loc"]) if not _is_tag(fault["loc"], i)]
    key = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}' (value {fault['input']!r})"
    if fault["type"] == "missing":
        return f"key '{key}' is missing"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"'{key}': {message}" if key else message
    return f"'{key}' = {fault['input']!r}: {message}"


def _is_tag(loc: tuple[int | str, ...], i: int) -> bool:
    return i >= 2 and loc[i - 2] == "stages" and loc[i] in ("ild", "kl", "ce")
