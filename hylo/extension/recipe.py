"""One YAML file for the whole demonstration, and the distillation recipes that are in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hylo.distill import Recipe, load_strict, parse_strict
from hylo.distill.recipe import PositiveInt, Source, Stage, StageName, Strict, UpcycleSettings

Stages = Annotated[list[Stage], Field(min_length=1)]


class Text(Strict):
    """Books: a tar archive of UTF-8 files, which is unpacked into `directory`/train and `directory`/held_out.

    `held_out` has shell patterns of file names; tokenizer and training never see what they match.
    """

    archive: str
    directory: str
    held_out: Annotated[list[str], Field(min_length=1)]
    vocabulary: Annotated[int, Field(ge=258)]  # every byte, BOS and EOS


class Teacher(Strict):
    """A Llama from random values: keys of its configuration, and the stages it is trained in."""

    model: dict[str, Any]
    stages: Stages


class Evaluation(Strict):
    """Lengths in tokens. `short_window` is the teacher's context, `long_window` what the hybrids are extended to.

    A needle's prompt has one of `needle_lengths`; those up to `short_window` are "within" the teacher's context.
    """

    short_window: PositiveInt
    long_window: PositiveInt
    batch_tokens: PositiveInt  # of the windows that are evaluated together
    needle_lengths: Annotated[list[PositiveInt], Field(min_length=2)]
    needle_depths: Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    needle_repeats: PositiveInt
    needle_digits: PositiveInt = 5
    needle_answer_tokens: PositiveInt = 8

    @model_validator(mode="after")
    def _short_and_long(self) -> Evaluation:
        if self.short_window >= self.long_window:
            raise ValueError(f"short_window must be below {self.long_window}, got {self.short_window}")
        shortest, longest = min(self.needle_lengths), max(self.needle_lengths)
        if not shortest <= self.short_window < longest:
            raise ValueError(
                f"needle_lengths must be on both sides of {self.short_window}, got {shortest} to {longest}"
            )
        return self


class Extension(Strict):
    """The whole run. Every hybrid goes through the same `stages`; the one named `short` ends the short training."""

    name: StageName
    output: str
    text: Text
    sources: Annotated[list[Source], Field(min_length=1)]
    teacher: Teacher
    hybrids: Annotated[dict[StageName, UpcycleSettings], Field(min_length=1)]
    stages: Stages
    short: StageName
    evaluation: Evaluation
    seed: Annotated[int, Field(ge=0)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _short_before_long(self) -> Extension:
        names = [stage.name for stage in self.stages]
        if self.short not in names[:-1]:
            raise ValueError(f"short must name a stage before the last of {', '.join(names)}, got '{self.short}'")
        return self

    @property
    def root(self) -> Path:
        return Path(self.output)

    @property
    def teacher_model(self) -> Path:
        """Where the trained teacher will be."""
        return self.root / "teacher" / self.teacher.stages[-1].name / "model"

    def hybrid_model(self, name: str, stage: str) -> Path:
        """Where hybrid `name` will be after a stage."""
        return self.root / name / stage / "model"

    def teacher_recipe(self) -> Recipe:
        """Trains the teacher from `random`/ in the output directory.

        Raises:
            UserError: the stages do not make a recipe.
        """
        return self._recipe("teacher", self.teacher.stages, {"path": str(self.root / "random")})

    def hybrid_recipe(self, name: str) -> Recipe:
        """Makes hybrid `name` of the trained teacher and trains it.

        Raises:
            UserError: the stages do not make a recipe.
        """
        student = {"upcycle": self.hybrids[name].model_dump(exclude_none=True) | {"base": str(self.teacher_model)}}
        return self._recipe(name, self.stages, student, teacher=str(self.teacher_model))

    def _recipe(self, name: str, stages: Sequence[Any], student: dict[str, Any], **more: str) -> Recipe:
        values = {
            "name": name,
            "output": str(self.root / name),
            "student": student,
            "data": {"sources": self.sources, "cache_dir": str(self.root / "tokens")},
            "stages": stages,
            "seed": self.seed,
            "precision": self.precision,
            "device": self.device,
        }
        return parse_strict(Recipe, values | more, origin=f"'{name}' of recipe '{self.name}'")


def load_extension(path: str | Path, *, overrides: Sequence[str] = ()) -> Extension:
    """Read and check a YAML file of the demonstration. Paths inside it are relative to the working directory.

    Args:
        overrides: "a.b.0.c=value" each, the value in YAML.
    Raises:
        UserError: the file cannot be read, is not YAML, or does not fit the schema.
    """
    return load_strict(Extension, Path(path), overrides=overrides)
