"""A killed run resumes and ends with the very same weights; an output directory is never taken over by mistake.

Children come from a fork server that has imported everything once, so a kill costs a fork and not an import.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystem

from hylo.distill import checkpoint as checkpoint_module
from hylo.distill import engine as engine_module
from hylo.distill import parse_recipe, run_recipe
from hylo.distill.out_of_memory import enough_memory
from hylo.errors import UserError
from tests.distill_fixtures import make_world, recipe_values, save_llama, shrunk

STEPS, EVERY = 14, 4
STAGES = (
    {"name": "align", "kind": "ild", "steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-2},
    {"name": "distil", "kind": "kl", "steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-2},
)
Kill = tuple[str, str, int] | None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("resume"))
    # Dropout makes the losses depend on the restored generator state too.
    save_llama(root / "student", seed=1, attention_dropout=0.1)
    return root


@pytest.fixture(scope="module")
def untouched(world: Path, forks: ForkServerContext) -> Path:
    """The output of a run that nobody disturbed."""
    assert run_child(forks, world, "untouched", None) == 0
    return world / "untouched"


def child(values: dict[str, Any], kill: Kill) -> None:
    torch.set_num_threads(1)
    if kill is not None:
        arrange(*kill)
    run_recipe(parse_recipe(values), resume=True, console=Console(file=io.StringIO()))


def arrange(what: str, stage: str, at: int) -> None:
    """Make this process die at optimiser step `at` (from 0) of `stage`, or in the middle of a checkpoint of it."""
    train_step, save = engine_module.train_step, torch.save

    def hit(job: engine_module.StageJob, step: int) -> bool:
        return job.stage.name == stage and step == at

    def dying_step(job: engine_module.StageJob, *args: Any) -> Any:
        step = args[2]
        if hit(job, step) and what == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = train_step(job, *args)
        if hit(job, step) and what in ("after", "terminate"):
            os.kill(os.getpid(), signal.SIGKILL if what == "after" else signal.SIGTERM)
        return result

    def dying_save(state: Any, file: BinaryIO) -> None:
        save(state, file)
        if isinstance(state, dict) and state["step"] == at and f"/{stage}/" in file.name:
            file.truncate(file.tell() // 2)
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    engine_module.train_step = dying_step
    if what == "checkpoint":
        checkpoint_module.torch.save = dying_save  # type: ignore[assignment]


def run_child(forks: ForkServerContext, world: Path, name: str, kill: Kill, **changes: Any) -> int | None:
    return run_values(forks, recipe_values(world, *STAGES, output=str(world / name), **changes), kill)


def run_values(forks: ForkServerContext, values: dict[str, Any], kill: Kill) -> int | None:
    process = forks.Process(target=child, args=(values, kill))
    process.start()
    process.join(60)
    return process.exitcode


def assert_same_end(one: Path, other: Path, *, stages: Sequence[str] = ("align", "distil"), steps: int = STEPS) -> None:
    for stage in stages:
        first, second = (load_file(root / stage / "model" / "model.safetensors") for root in (one, other))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"{stage} {name}"
    first_log, second_log = (logged(root) for root in (one, other))
    assert first_log == second_log
    assert len(first_log) == len(stages) * steps


def logged(root: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("stage", "step", "loss", "lr", "grad_norm", "tokens")) for row in rows]


def test_killed_at_random_steps_of_both_stages(world: Path, forks: ForkServerContext, untouched: Path) -> None:
    chance = random.Random(20260427)
    for stage in ("align", "distil"):
        for step in sorted(chance.sample(range(STEPS), 10)):
            kill = (chance.choice(["before", "after"]), stage, step)
            assert run_child(forks, world, "killed", kill) == -signal.SIGKILL, kill
    assert run_child(forks, world, "killed", None) == 0
    assert_same_end(world / "killed", untouched)


@pytest.mark.parametrize("stage", ["align", "distil"])
def test_killed_inside_a_checkpoint_write(world: Path, forks: ForkServerContext, untouched: Path, stage: str) -> None:
    name = f"torn-{stage}"
    assert run_child(forks, world, name, ("checkpoint", stage, 2 * EVERY)) == -signal.SIGKILL
    checkpoints = world / name / stage / "checkpoints"
    assert checkpoint_module.checkpoint_steps(checkpoints) == [EVERY]
    assert len(list(checkpoints.glob(".step-*.partial"))) == 1
    assert run_child(forks, world, name, None) == 0
    assert_same_end(world / name, untouched)
    assert not list((world / name).rglob("*.partial"))


def test_hybrid_student_resumes_too(world: Path, forks: ForkServerContext) -> None:
    block = {"base": str(world / "teacher"), "mixer": "gated_deltanet", "mla_layers": [1], "init": "aligned"}
    hybrid = {"student": {"upcycle": block}}
    assert run_child(forks, world, "hybrid", None, **hybrid) == 0
    for kill in (("after", "align", 6), ("before", "distil", 9)):
        assert run_child(forks, world, "killed-hybrid", kill, **hybrid) == -signal.SIGKILL
    assert run_child(forks, world, "killed-hybrid", None, **hybrid) == 0
    assert_same_end(world / "killed-hybrid", world / "hybrid")


def test_killed_between_the_stages_of_a_published_recipe(forks: ForkServerContext, tmp_path: Path) -> None:
    """2K, 8K, 64K in small: after a stage's last step, before its result is kept, and before the next one's first."""
    stages, steps = ("align", "distil-8k", "distil-64k"), 4
    recipe = shrunk("llama-3.2-1b-4mla12gdn-8k-64k.yaml", tmp_path, steps=steps)
    untouched, killed = (recipe.model_dump(mode="json") | {"output": str(tmp_path / name)} for name in ("one", "two"))
    assert run_values(forks, untouched, None) == 0
    for earlier, later in pairwise(stages):
        for kill in (("after", earlier, steps - 1), ("before", later, 0)):
            assert run_values(forks, killed, kill) == -signal.SIGKILL, kill
        assert (tmp_path / "two" / earlier / "model").exists()
    assert run_values(forks, killed, None) == 0
    assert_same_end(tmp_path / "two", tmp_path / "one", stages=stages, steps=steps)


def test_sigterm_saves_and_exits_with_143(world: Path, forks: ForkServerContext, untouched: Path) -> None:
    assert run_child(forks, world, "terminated", ("terminate", "distil", 5)) == 143
    assert checkpoint_module.checkpoint_steps(world / "terminated" / "distil" / "checkpoints") == [4, 6]
    assert run_child(forks, world, "terminated", None) == 0
    assert_same_end(world / "terminated", untouched)


def test_old_checkpoints_go_and_a_damaged_one_is_named(world: Path, forks: ForkServerContext) -> None:
    assert run_child(forks, world, "kept", ("after", "align", 13)) == -signal.SIGKILL
    checkpoints = world / "kept" / "align" / "checkpoints"
    assert checkpoint_module.checkpoint_steps(checkpoints) == [8, 12]
    newest = checkpoints / "step-000000012"
    assert {path.name for path in newest.iterdir()} == {".metadata", "__0_0.distcp", checkpoint_module.PROGRESS_FILE}
    for path in newest.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=r"checkpoint '.*step-000000012.*' cannot be read") as caught:
            run_here(recipe_values(world, *STAGES, output=str(world / "kept")), resume=True)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)
    assert run_child(forks, world, "kept", None) == 0


def run_here(values: dict[str, Any], *, resume: bool = False) -> Path | None:
    return run_recipe(parse_recipe(values), resume=resume, console=Console(file=io.StringIO()))


def test_output_of_this_recipe_needs_resume(world: Path, untouched: Path) -> None:
    values = recipe_values(world, *STAGES, output=str(untouched))
    before = {path: path.stat().st_mtime_ns for path in untouched.rglob("*")}
    with pytest.raises(UserError, match=r"untouched' exists: its run of this recipe is finished"):
        run_here(values)
    assert run_here(values, resume=True) == untouched / "distil" / "model"
    assert {path: path.stat().st_mtime_ns for path in untouched.rglob("*")} == before


def test_unfinished_output_says_how_to_go_on(world: Path, forks: ForkServerContext) -> None:
    assert run_child(forks, world, "unfinished", ("after", "align", 5)) == -signal.SIGKILL
    with pytest.raises(UserError, match=r"unfinished' exists: its run of this recipe is unfinished; resume"):
        run_here(recipe_values(world, *STAGES, output=str(world / "unfinished")))


def test_output_of_another_recipe_is_refused(world: Path, untouched: Path) -> None:
    other = recipe_values(world, *STAGES, output=str(untouched), seed=43)
    with pytest.raises(UserError, match=r"holds another recipe's run: 'seed' was 42 and is now 43"):
        run_here(other, resume=True)


def test_changed_data_are_noticed(forks: ForkServerContext, tmp_path: Path) -> None:
    root = make_world(tmp_path)
    assert run_child(forks, root, "run", ("after", "align", 5)) == -signal.SIGKILL
    (root / "text.txt").write_text("another text " * 200)
    with pytest.raises(UserError, match=r"the data of output directory '.*run' have changed"):
        run_here(recipe_values(root, *STAGES, output=str(root / "run")), resume=True)


def test_foreign_directory_is_refused_and_kept(world: Path) -> None:
    (world / "foreign").mkdir()
    (world / "foreign" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"foreign' exists and was not made by a recipe run"):
        run_here(recipe_values(world, *STAGES, output=str(world / "foreign")), resume=True)
    assert [path.name for path in (world / "foreign").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("full", ["tensors", "progress"])
def test_full_disk_during_a_checkpoint_keeps_the_older_one(tmp_path: Path, full: str) -> None:
    state = {"w": torch.zeros(1_000_000)}
    checkpoint_module.save_checkpoint(tmp_path, 1, state, {"step": 1}, keep=2)
    with pytest.MonkeyPatch.context() as patch:
        if full == "progress":
            patch.setattr(checkpoint_module, "open_progress_file", lambda _path: open("/dev/full", "wb"))  # noqa: SIM115
        else:
            patch.setattr(FileSystem, "create_stream", lambda *_: open("/dev/full", "wb"))  # noqa: SIM115
        with pytest.raises(UserError, match=r"no space left on the disk while writing '.*step-000000002'"):
            checkpoint_module.save_checkpoint(tmp_path, 2, state, {"step": 2}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_full_gpu_is_told_in_one_sentence_and_the_run_goes_on(world: Path, untouched: Path) -> None:
    """With smaller batches, too: a step has the same sequences."""
    values = recipe_values(world, *STAGES, output=str(world / "crowded"))
    real = engine_module.train_step

    def crowded(job: Any, optimizer: Any, parameters: Any, step: int, rate: float) -> Any:
        if job.stage.kind == "kl" and step == EVERY + 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has\na page of text")
        return real(job, optimizer, parameters, step, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "train_step", crowded)
        with pytest.raises(UserError) as caught:
            run_here(values, resume=True)
    assert str(caught.value) == (
        "stage 'distil' needs more memory than the GPU has (CUDA out of memory. Tried to allocate 3.00 GiB): set "
        "activation_checkpointing or set batch_size to 1 and gradient_accumulation to 2 or set mlp_tile_tokens to 4096 "
        "or share the run between GPUs with torchrun; `hylo memory` tells what each saves, and --resume goes on from "
        f"step {EVERY} of the stage"
    )
    smaller = [stage | {"batch_size": 1, "gradient_accumulation": 2, "mlp_tile_tokens": 8} for stage in STAGES]
    smaller[1]["activation_checkpointing"] = "selective"
    run_here(recipe_values(world, *smaller, output=values["output"]), resume=True)
    ends = [load_file(root / "distil" / "model" / "model.safetensors") for root in (world / "crowded", untouched)]
    assert ends[0].keys() == ends[1].keys()
    larger = [stage | {"batch_size": 4} for stage in STAGES]
    with pytest.raises(UserError, match=r"'stages.0.batch_size \* gradient_accumulation' was 2 and is now 4"):
        run_here(recipe_values(world, *larger, output=values["output"]), resume=True)


@pytest.mark.parametrize(
    ("way", "advice"),
    [
        (False, "set activation_checkpointing or "),
        ("selective", "set activation_checkpointing to true or "),
        (True, ""),
    ],
)
def test_a_full_gpu_gets_the_advice_that_is_left(tmp_path: Path, way: Any, advice: str) -> None:
    values = recipe_values(tmp_path, STAGES[1] | {"activation_checkpointing": way})
    with pytest.raises(UserError) as caught, enough_memory(parse_recipe(values).stages[0], tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert f"(CUDA out of memory): {advice}set batch_size to 1" in str(caught.value)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_steps_are_counted_where_the_optimiser_would(fused: bool, device: str) -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    engine_module._expect_state(model, optimizer, {"optimizer.weight.step"})
    (state,) = optimizer.state.values()
    assert state["step"].device.type == device
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "meta"
