"""Whose output directory it is: a run never writes into a directory that another run, or somebody else, made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hylo.atomic import write_text_atomically
from hylo.distill.log import LOG_FILE
from hylo.distill.recipe import Recipe
from hylo.errors import UserError

RUN_FILE = "run.json"
# Of a stage: what trades time for memory, and changes no more of its result than the order of sums.
_FREE = ("activation_checkpointing", "mlp_tile_tokens", "kl_chunk_tokens")


def run_identity(recipe: Recipe, steps: int | None, scale: float | None) -> dict[str, Any]:
    """What a run is made of, as JSON values; two are one run's if what `decisive` leaves is equal.

    Raises:
        UserError: both `steps` and `scale` are given, or one is not positive.
    """
    if steps is not None and scale is not None:
        raise UserError(f"steps {steps} and steps_scale {scale} exclude each other")
    for name, value in (("steps", steps), ("steps_scale", scale)):
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value} but must be positive")
    return {"recipe": recipe.plain(), "steps": steps, "steps_scale": scale}


def decisive(stages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What of the stages' values decides their results: of the batch, how many sequences a step has."""
    left_out = {*_FREE, "batch_size", "gradient_accumulation"}
    return [
        {name: value for name, value in stage.items() if name not in left_out}
        | {"batch_size * gradient_accumulation": stage["batch_size"] * stage["gradient_accumulation"]}
        for stage in stages
    ]


def _decisive(identity: dict[str, Any]) -> dict[str, Any]:
    recipe = identity["recipe"]
    return identity | {"recipe": recipe | {"stages": decisive(recipe["stages"])}}


def result_directory(recipe: Recipe, index: int) -> Path:
    """Where stage `index` leaves its model."""
    return Path(recipe.output) / recipe.stages[index].name / "model"


def is_finished(recipe: Recipe, identity: dict[str, Any], *, resume: bool) -> bool:
    """Whether the run is complete already.

    Raises:
        UserError: the output directory must not be touched: it is not this run's, or it is and `resume` is not given.
    """
    output = Path(recipe.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / RUN_FILE).is_file():
        raise UserError(f"output directory '{output}' exists and was not made by a recipe run")
    found = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    found = {name: found[name] for name in identity}  # the hash of the data is compared once they are packed
    found, wanted = _decisive(found), _decisive(identity)
    if found != wanted:
        raise UserError(f"output directory '{output}' holds another recipe's run: {_difference(found, wanted)}")
    done = result_directory(recipe, -1).exists()
    if not resume:
        state = "is finished" if done else "is unfinished; resume continues it"
        raise UserError(f"output directory '{output}' exists: its run of this recipe {state}")
    return done


@contextmanager
def owned_output(output: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Make the directory this run's own; `identity` is `run_identity` and the hash of the data.

    Raises:
        UserError: it is this run's already, but the data were others.
    Where a user's mistake shows before the first step is logged, what this call made is removed again.
    """
    fresh = not output.exists()
    recorded = output / RUN_FILE
    if recorded.exists() and _decisive(json.loads(recorded.read_text(encoding="utf-8"))) != _decisive(identity):
        raise UserError(f"the data of output directory '{output}' have changed since its run began")
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomically(recorded, json.dumps(identity, indent=2) + "\n")
        yield
    except UserError:
        if fresh and not (output / LOG_FILE).exists():
            shutil.rmtree(output)
        raise


def _difference(found: Any, wanted: Any, key: str = "") -> str:
    """The first key whose values differ, with both."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                return _difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if one != other:
                return _difference(one, other, f"{key}.{index}")
    return f"'{key.removeprefix('recipe.')}' was {found!r} and is now {wanted!r}"
