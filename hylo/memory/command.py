"""The tables of `hylo memory`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from hylo.distill.recipe import load_recipe
from hylo.evaluate import cache_bytes
from hylo.memory.counts import parameter_counts
from hylo.memory.recipe import stage_job
from hylo.memory.training import PARTS, Job, peak, phases

GIB = 2**30
TILE = 4096  # tokens, to compare with where a recipe names none


def memory_command(
    path: Path,
    *,
    stage: int | None,
    gpus: int,
    length: int | None,
    batch: int | None,
    gpu_gib: float,
    overrides: Sequence[str],
    console: Console,
) -> None:
    """Print what the stages of a recipe take on each GPU, by formula.

    Args:
        stage: one stage alone, counted from 0.
        length, batch: tokens of a sequence and sequences of a forward pass, instead of the stages'.
        gpu_gib: size of a GPU's memory in GiB.
    Raises:
        UserError: the recipe does not fit its schema, or there is no such stage or no formula.
    """
    recipe = load_recipe(path, overrides=overrides)
    for index in range(len(recipe.stages)) if stage is None else [stage]:
        job = stage_job(recipe, index, gpus=gpus, length=length, batch=batch)
        console.print(phase_table(f"stage {recipe.stages[index].name}: {_what(job)}", job, gpu_gib))
        console.print(choice_table(job, gpu_gib), "")
    console.print(cache_table(job, gpu_gib))


def phase_table(title: str, job: Job, gpu_gib: float) -> Table:
    """GiB of each part in each phase."""
    found = phases(job)
    table = _table(title, "GiB", *(phase.name for phase in found))
    for part in PARTS:
        table.add_row(part.replace("_", " "), *(_gib(getattr(phase, part)) for phase in found))
    table.add_section()
    table.add_row("sum", *(_gib(phase.total) for phase in found))
    table.add_row(f"left of {gpu_gib:g}", *(_gib(gpu_gib * GIB - phase.total) for phase in found))
    return table


def choice_table(job: Job, gpu_gib: float) -> Table:
    """The step's peak for each way to trade time for memory."""
    table = _table("", "GiB at peak", "activations", "room", "sum", "left", "fullest")
    for name, choice in choices(job).items():
        most = peak(choice)
        numbers = (most.activations, most.room, most.total, gpu_gib * GIB - most.total)
        table.add_row(name, *map(_gib, numbers), most.name)
    return table


def choices(job: Job) -> dict[str, Job]:
    tile = job.tile or TILE
    tiles = f"tiles of {tile}"
    if job.kind == "ild":
        return {"whole MLPs": replace(job, tile=None), tiles: replace(job, tile=tile)}
    checkpointed = replace(job, checkpointing=True, tile=None)
    return {
        "all kept": replace(job, checkpointing=False, tile=None),
        f"all kept, {tiles}": replace(job, checkpointing=False, tile=tile),
        "selective": replace(job, checkpointing="selective", tile=None),
        f"selective, {tiles}": replace(job, checkpointing="selective", tile=tile),
        "checkpointing": checkpointed,
        f"checkpointing, {tiles}": replace(checkpointed, tile=tile),
    }


def cache_table(job: Job, gpu_gib: float) -> Table:
    """The student at inference: bf16 weights, and the caches of as many sequences of the same length."""
    cache = cache_bytes(job.student, torch.bfloat16)
    parts = {
        "parameters": 2 * parameter_counts(job.student).total,
        "latent cache": job.batch * job.length * cache.per_token,
        "recurrent states": job.batch * cache.recurrent_state,
        "convolution states": job.batch * cache.conv_state,
    }
    table = _table(f"inference, {job.batch} x {job.length} tokens, bf16", "GiB", "")
    for name, size in parts.items():
        table.add_row(name, _gib(size))
    table.add_section()
    table.add_row("sum", _gib(sum(parts.values())))
    table.add_row(f"left of {gpu_gib:g}", _gib(gpu_gib * GIB - sum(parts.values())))
    return table


def _what(job: Job) -> str:
    checkpointing = {False: [], True: ["checkpointing"], "selective": ["selective checkpointing"]}[job.checkpointing]
    ways = checkpointing + [f"tiles of {job.tile}"] * (job.tile is not None)
    shared = f", shared by {job.gpus} GPUs" if job.gpus > 1 else ""
    otherwise = "a layer at a time" if job.kind == "ild" else "all kept"
    return f"{job.kind}, {job.batch} x {job.length} tokens, {', '.join(ways) or otherwise}{shared}"


def _table(title: str, first: str, *others: str) -> Table:
    # With a word of a heading in each line, all phases fit 80 columns.
    form: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    table = Table(title=title, title_justify="left", min_width=len(title), **form)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name.replace(" ", "\n"), justify="right")
    return table


def _gib(size: float) -> str:
    """In five characters, so that all phases fit 80 columns, as long as the whole number has no more."""
    texts = [f"{size / GIB:.{decimals}f}" for decimals in (2, 1, 0)]
    return next((text for text in texts if len(text) <= 5), texts[-1])
