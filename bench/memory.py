"""python -m bench.memory: peak memory of a recipe's training step at true dims, phase by phase, beside the formulas.

Random weights; the engine's own step, two of them, since the optimiser has no moments in the first. A case that runs
out of memory is a row that says so.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.steps import Case, most_bytes, random_steps
from hylo.distill.recipe import Recipe
from hylo.memory import Job, Phase, phases, stage_job

HERE = Path(__file__).parent
LLAMA, QWEN = "llama-3.2-1b-4mla12gdn-8k", "qwen3-1.7b-7mla21gdn-8k"
STEPS = 2
# What a phase is measured together with: no hook lies between them.
MERGED = {"loss backward": "loss", "embedding backward": "backward"}


_LONG = {"sequence_length": 65536, "batch_size": 1}
_SHORT = {"sequence_length": 8192, "batch_size": 1}
CASES = {
    "1b-align": Case(LLAMA, 0, {}),
    "1b-8k": Case(LLAMA, 1, {}),
    "1b-8k-kept": Case(LLAMA, 1, _SHORT | {"activation_checkpointing": False}),
    "1b-8k-first": Case(LLAMA, 1, _SHORT | {"gradient_accumulation": 1}),
    "1b-64k": Case(LLAMA, 1, _LONG),
    "1b-64k-selective": Case(LLAMA, 1, _LONG | {"activation_checkpointing": "selective"}),
    "1b-64k-tiles": Case(LLAMA, 1, _LONG | {"mlp_tile_tokens": 4096}),
    "qwen-8k": Case(QWEN, 1, {}),
    "qwen-64k-tiles": Case(QWEN, 1, _LONG | {"mlp_tile_tokens": 4096}),
    # The rows of the paper's table whose losses are here, on its model.
    "m2-64k-no-teacher-kept": Case(
        LLAMA, 1, _LONG | {"mixer": "mamba2", "kind": "ce", "activation_checkpointing": False}
    ),
    "m2-64k-no-teacher": Case(LLAMA, 1, _LONG | {"mixer": "mamba2", "kind": "ce"}),
    "m2-64k-kept": Case(LLAMA, 1, _LONG | {"mixer": "mamba2", "activation_checkpointing": False}),
    "m2-64k": Case(LLAMA, 1, _LONG | {"mixer": "mamba2"}),
}


def measure(recipe: Recipe, index: int, device: torch.device, take: Callable[[], int]) -> dict[str, int]:
    """Peak bytes of each phase of the second training step.

    Args:
        take: the most bytes at one time since it was last called.
    """
    steps = random_steps(recipe, index, device, STEPS)
    found: dict[str, int] = {}
    student, teacher = steps.job.student, steps.job.teacher
    _mark_phases(student, teacher, steps.optimizer, lambda name: found.update({name: max(found.get(name, 0), take())}))
    for step in range(STEPS):
        steps.optimizer.zero_grad(set_to_none=True)  # the last step's gradients are in no phase of this one
        take()
        found.clear()
        steps.run(step)
    return found


def _mark_phases(student: Any, teacher: Any, optimizer: torch.optim.Optimizer, mark: Callable[[str], None]) -> None:
    """Call `mark` at the end of each phase. An alignment has no forward or backward of a whole model."""
    if teacher is not None:
        teacher.model.register_forward_hook(lambda *_: mark("teacher forward"))
    student.model.register_forward_hook(lambda *_: mark("student forward"))
    student.lm_head.weight.register_post_accumulate_grad_hook(lambda _: mark("loss"))
    student.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda _: mark("backward"))
    optimizer.register_step_pre_hook(lambda *_: mark("backward"))
    optimizer.register_step_post_hook(lambda *_: mark("optimiser step"))


def formulas(job: Job) -> dict[str, Phase]:
    """The formulas' phases under the names that are measured."""
    found: dict[str, Phase] = {}
    for phase in phases(job):
        name = MERGED.get(phase.name, phase.name)
        if job.kind == "ild" and name == "teacher forward":
            name = "backward"
        if name not in found or found[name].total < phase.total:
            found[name] = phase
    return found


def row(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """One case, measured and by formula, in bytes."""
    recipe = case.load()
    job = stage_job(recipe, case.stage)
    expected = formulas(job)
    result: dict[str, Any] = {
        "case": name, "recipe": case.recipe, "kind": job.kind, "batch": job.batch, "sequence_length": job.length,
        "changes": case.changes, "formula": {phase: asdict(parts) for phase, parts in expected.items()},
        "formula_peak_bytes": max(parts.total for parts in expected.values()),
    }  # fmt: skip
    most_bytes()
    try:
        measured = measure(recipe, case.stage, device, most_bytes)
    except torch.OutOfMemoryError:
        return result | {"measured": None, "peak_bytes": None, "ratio": None}
    most = max(measured.values())
    return result | {"measured": measured, "peak_bytes": most, "ratio": result["formula_peak_bytes"] / most}


def line(found: dict[str, Any]) -> str:
    by_formula = found["formula_peak_bytes"] / 2**30
    if found["peak_bytes"] is None:
        return f"{found['case']}: out of memory; {by_formula:.2f} GiB by formula"
    phases_of = ", ".join(
        f"{name} {size / 2**30:.2f} ({_total(found['formula'].get(name)) / 2**30:.2f})"
        for name, size in found["measured"].items()
    )
    measured = found["peak_bytes"] / 2**30
    return (
        f"{found['case']}: {measured:.2f} GiB measured, {by_formula:.2f} by formula ({found['ratio']:.2f}): {phases_of}"
    )


def _total(parts: dict[str, Any] | None) -> int:
    return 0 if parts is None else sum(size for size in parts.values() if isinstance(size, int))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", default=list(CASES))
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/<gpu>/memory.json by default")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: peaks of memory need an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"meta": record.meta(options.commit), "rows": []}
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu / "memory.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.case:
        result["rows"].append(row(name, CASES[name], torch.device("cuda")))
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(line(result["rows"][-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
