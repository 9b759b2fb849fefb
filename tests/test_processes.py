"""Several processes against one: the same losses and weights, each other's checkpoints, and one writer.

Processes come from a fork server that has imported everything once, with the variables that torchrun would set.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from hylo.distill import engine as engine_module
from hylo.distill import parse_recipe, run_recipe
from hylo.distill.checkpoint import checkpoint_steps, load_progress
from hylo.distill.layers import decoder_layers
from hylo.distill.processes import joined, on_first
from hylo.errors import ToldElsewhere, UserError
from tests.distill_fixtures import make_world, recipe_values, save_llama

STEPS, EVERY = 6, 2
SHORT = {"steps": STEPS, "checkpoint_every": EVERY, "learning_rate": 1e-3, "batch_size": 2, "gradient_accumulation": 4}
STAGES = (
    {"name": "align", "kind": "ild", **SHORT},
    {"name": "distil", "kind": "kl", "activation_checkpointing": True, "ce_weight": 0.5, **SHORT},
    {"name": "lm", "kind": "ce", "trainable": ["mlp", "norm"], **SHORT, "batch_size": 4, "gradient_accumulation": 1},
)
Kill = tuple[str, str, int] | None


def two_gpus(test: Any) -> Any:
    missing = torch.cuda.device_count() < 2
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs two NVIDIA GPUs")(test))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher of a larger MLP; for hybrids a base whose head is its embedding and a wider teacher."""
    root = make_world(tmp_path_factory.mktemp("processes"))
    save_llama(root / "teacher", seed=2, intermediate_size=256)
    save_llama(root / "base", seed=1, tie_word_embeddings=True)
    save_llama(root / "wide", seed=3, hidden_size=24, num_hidden_layers=3)
    return root


@pytest.fixture(scope="module")
def alone(world: Path, forks: ForkServerContext) -> Path:
    """The output of one process, undisturbed."""
    assert run(forks, world, "alone", processes=1) == [0]
    return world / "alone"


def as_one_of(number: int, count: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def child(number: int, count: int, port: int, values: dict[str, Any], kill: Kill) -> None:
    as_one_of(number, count, port)
    if kill is not None:
        arrange(*kill, number)
    console = Console(file=io.StringIO(), width=120)
    run_recipe(parse_recipe(values), resume=True, console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert bool(printed) == (number == 0), printed


def arrange(what: str, stage: str, at: int, number: int) -> None:
    """After step `at` of the stage all die, or the last is asked to stop, or each tells of its share; or the last dies
    while it writes its share of the checkpoint."""
    train_step = engine_module.train_step
    create_stream = FileSystem.create_stream

    def dying_stream(system: FileSystem, path: Path, mode: str) -> Any:
        if (what, number, mode) == ("tear", 1, "wb") and f"/{stage}/checkpoints/.step-{at:09d}." in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return create_stream(system, path, mode)

    def watched_step(job: engine_module.StageJob, *args: Any) -> Any:
        if (job.stage.name, args[2]) != (stage, at):
            return train_step(job, *args)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = train_step(job, *args)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "terminate" and number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "tell":
            exchanges = [e.key for e in profiler.events() if e.key.startswith("FSDP::post_backward_reduce")]
            shares = {name: share_of(model) for name, model in (("student", job.student), ("teacher", job.teacher))}
            told = {"exchanged": exchanges, **shares}
            (job.checkpoints.parents[1] / f"told-{number}.json").write_text(json.dumps(told))
        return result

    FileSystem.create_stream = dying_stream  # type: ignore[method-assign]
    engine_module.train_step = watched_step


def run(
    forks: ForkServerContext, world: Path, name: str, *, processes: int, kill: Kill = None, **changes: Any
) -> list[int | None]:
    """Exit codes of the recipe's processes."""
    values = recipe_values(world, *changes.pop("stages", STAGES), output=str(world / name), **changes)
    return start(forks, processes, child, values, kill)


def start(forks: ForkServerContext, count: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Exit codes of `count` processes that call the target."""
    port = free_port()
    started = [forks.Process(target=target, args=(number, count, port, *arguments)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def logged(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, stages: tuple[dict[str, Any], ...] = STAGES) -> None:
    """Losses, gradient norms and weights of two runs to 1e-5, each line of the log once."""
    first, second = logged(one), logged(other)
    assert [(row["stage"], row["step"]) for row in first] == [(s["name"], n + 1) for s in stages for n in range(STEPS)]
    for key in ("stage", "step", "tokens", "lr"):
        assert [row[key] for row in first] == [row[key] for row in second]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in first] == pytest.approx([row[key] for row in second], rel=1e-5)
    for stage in stages:
        ours, theirs = (load_file(root / stage["name"] / "model" / "model.safetensors") for root in (one, other))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-5, msg=f"{stage['name']} {name}")
    assert not [*one.rglob("*.partial"), *one.rglob("checkpoints")]


def test_two_processes_train_as_one(world: Path, forks: ForkServerContext, alone: Path) -> None:
    assert run(forks, world, "two", processes=2) == [0, 0]
    assert_same_run(world / "two", alone)
    assert (world / "two" / "run.json").read_bytes() == (alone / "run.json").read_bytes()
    files = {path.relative_to(alone) for path in alone.rglob("*")}
    assert {path.relative_to(world / "two") for path in (world / "two").rglob("*")} == files
    for stage in STAGES:
        config = (root / stage["name"] / "model" / "config.json" for root in (world / "two", alone))
        assert next(config).read_bytes() == next(config).read_bytes()
    AutoModelForCausalLM.from_pretrained(world / "two" / "lm" / "model")


@pytest.mark.parametrize("before", [1, 2])
def test_killed_run_goes_on_with_another_number_of_processes(
    world: Path, forks: ForkServerContext, alone: Path, before: int
) -> None:
    """Killed once in each stage, each time started with the other number: one reads checkpoints of two, two of one."""
    name, processes = f"killed-{before}", before
    for stage in STAGES:
        kill = ("kill", str(stage["name"]), 3)
        assert run(forks, world, name, processes=processes, kill=kill) == [-signal.SIGKILL] * processes
        assert checkpoint_steps(world / name / str(stage["name"]) / "checkpoints") == [2]
        processes = 3 - processes
    assert run(forks, world, name, processes=processes) == [0] * processes
    assert_same_run(world / name, alone)


def test_a_checkpoint_has_the_student_once_and_no_teacher(world: Path, forks: ForkServerContext) -> None:
    stage = (STAGES[1],)
    run(forks, world, "checkpointed", processes=2, kill=("kill", "distil", 3), stages=stage)
    checkpoints = world / "checkpointed" / "distil" / "checkpoints"
    directory = checkpoints / "step-000000002"
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    student = dict(AutoModelForCausalLM.from_pretrained(world / "student").named_parameters())
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(saved) == {f"model.{name}" for name in student} | {
        f"optimizer.{name}.{kind}" for name in student for kind in kinds
    }
    for name, parameter in student.items():
        assert saved[f"model.{name}"].size == parameter.shape
    content = 3 * 4 * sum(parameter.numel() for parameter in student.values())
    shares = [path.stat().st_size for path in directory.glob("*.distcp")]
    assert len(shares) == 2
    # Each tensor has a header of about a kilobyte.
    assert content < sum(shares) < content + 2 * 2048 * len(saved)
    assert max(shares) < 0.6 * sum(shares)
    progress = load_progress(checkpoints, 2)
    assert (progress["stage"], progress["step"], progress["sequences"]) == ("distil", 2, 2 * 8)
    first, second = progress["random"]
    assert not torch.equal(first["torch"], second["torch"])


def test_a_process_that_dies_while_it_writes_leaves_the_older_checkpoint(
    world: Path, forks: ForkServerContext, alone: Path
) -> None:
    first, second = run(forks, world, "torn", processes=2, kill=("tear", "distil", 4))
    assert (first, second) == (1, -signal.SIGKILL)
    assert checkpoint_steps(world / "torn" / "distil" / "checkpoints") == [2]
    assert run(forks, world, "torn", processes=2) == [0, 0]
    assert_same_run(world / "torn", alone)


def test_one_process_asked_to_stop_stops_all_after_the_same_step(
    world: Path, forks: ForkServerContext, alone: Path
) -> None:
    kill = ("terminate", "distil", 2)
    assert run(forks, world, "terminated", processes=2, kill=kill) == [143, 143]
    assert checkpoint_steps(world / "terminated" / "distil" / "checkpoints") == [2, 3]
    assert run(forks, world, "terminated", processes=2) == [0, 0]
    assert_same_run(world / "terminated", alone)


def share_of(model: nn.Module | None) -> float | None:
    """The part of the layers' elements that this process holds between steps."""
    if model is None:
        return None
    tensors = [parameter for layer in decoder_layers(model) for parameter in layer.parameters()]
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() for tensor in own) / sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(("stage", "units"), [(STAGES[0], 3), (STAGES[1], 4), (STAGES[2], 3)])
def test_each_holds_its_share_and_gradients_are_exchanged_once_a_step(
    world: Path, forks: ForkServerContext, stage: dict[str, Any], units: int
) -> None:
    """Of two layers and the norm, and of embedding and head where they have gradients; not at each micro-batch."""
    name, stages = f"telling-{stage['name']}", (stage | {"batch_size": 1, "gradient_accumulation": 8},)
    assert run(forks, world, name, processes=2, kill=("tell", stage["name"], 1), stages=stages) == [0, 0]
    for number in range(2):
        told = json.loads((world / name / f"told-{number}.json").read_text())
        assert len(told["exchanged"]) == len(set(told["exchanged"])) == units
        assert told["student"] == 0.5
        assert told["teacher"] == (None if stage["kind"] == "ce" else 0.5)


def test_two_processes_resume_to_the_same_bits(world: Path, forks: ForkServerContext) -> None:
    """Dropout makes the losses depend on each one's generators, which differ."""
    save_llama(world / "dropping", seed=1, attention_dropout=0.1)
    settings = {"student": {"path": str(world / "dropping")}, "stages": STAGES[1:2]}
    assert run(forks, world, "straight", processes=2, **settings) == [0, 0]
    kill = ("kill", "distil", 3)
    assert run(forks, world, "bent", processes=2, kill=kill, **settings) == [-signal.SIGKILL] * 2
    assert run(forks, world, "bent", processes=2, **settings) == [0, 0]
    bent, straight = (world / name for name in ("bent", "straight"))
    assert [row["loss"] for row in logged(bent)] == [row["loss"] for row in logged(straight)]
    ours, theirs = (load_file(root / "distil" / "model" / "model.safetensors") for root in (bent, straight))
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_attention_is_kept_of_shared_layers_too(world: Path, forks: ForkServerContext) -> None:
    block = {"base": str(world / "base"), "mixer": "gated_deltanet", "mla_layers": [1]}
    settings: dict[str, Any] = {"student": {"upcycle": block}, "teacher": str(world / "wide")}
    for processes, way in ((1, True), (2, "selective")):
        settings["stages"] = (STAGES[1] | {"activation_checkpointing": way},)
        assert run(forks, world, f"kept-{processes}", processes=processes, **settings) == [0] * processes
    assert_same_run(world / "kept-2", world / "kept-1", STAGES[1:2])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_a_hybrid_with_a_tied_head_and_a_wider_teacher(world: Path, forks: ForkServerContext, mixer: str) -> None:
    block = {"base": str(world / "base"), "mixer": mixer, "mla_layers": [1], "init": "aligned"}
    settings = {"student": {"upcycle": block}, "teacher": str(world / "wide"), "stages": STAGES[:2]}
    outputs = [world / f"hybrid-{mixer}-{processes}" for processes in (1, 2)]
    for processes, output in enumerate(outputs, start=1):
        assert run(forks, world, output.name, processes=processes, **settings) == [0] * processes
    assert_same_run(outputs[1], outputs[0], STAGES[:2])


def test_more_processes_than_a_parameter_has_rows(world: Path, forks: ForkServerContext) -> None:
    """Some hold nothing of it; their checkpoints are read by one all the same."""
    block = {"base": str(world / "base"), "mixer": "gated_deltanet", "mla_layers": [1], "linear_num_heads": 2}
    settings = {"student": {"upcycle": block}, "stages": STAGES[:1]}
    assert run(forks, world, "rows-alone", processes=1, **settings) == [0]
    kill = ("kill", "align", 3)
    assert run(forks, world, "rows", processes=4, kill=kill, **settings) == [-signal.SIGKILL] * 4
    assert run(forks, world, "rows", processes=1, **settings) == [0]
    assert_same_run(world / "rows", world / "rows-alone", STAGES[:1])


def test_bf16_differs_by_rounding(world: Path, forks: ForkServerContext) -> None:
    assert_losses_of_one(forks, world, "bf16", precision="bf16")


def assert_losses_of_one(forks: ForkServerContext, world: Path, name: str, **changes: Any) -> None:
    """Two processes have one's losses to 1e-3."""
    losses = {}
    for processes in (1, 2):
        assert run(forks, world, f"{name}-{processes}", processes=processes, **changes) == [0] * processes
        losses[processes] = [row["loss"] for row in logged(world / f"{name}-{processes}")]
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


@two_gpus
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_train_as_one(world: Path, forks: ForkServerContext, precision: str) -> None:
    block = {"base": str(world / "base"), "mixer": "gated_deltanet", "mla_layers": [1], "init": "aligned"}
    settings = {"student": {"upcycle": block}, "device": "cuda", "precision": precision}
    assert_losses_of_one(forks, world, f"gpus-{precision}", **settings)


@two_gpus
@pytest.mark.parametrize("before", [1, 2])
def test_run_goes_on_with_another_number_of_gpus(world: Path, forks: ForkServerContext, before: int) -> None:
    name, settings = f"gpus-from-{before}", {"device": "cuda", "stages": STAGES[1:2]}
    assert run(forks, world, f"{name}-straight", processes=1, **settings) == [0]
    kill = ("kill", "distil", 3)
    assert run(forks, world, name, processes=before, kill=kill, **settings) == [-signal.SIGKILL] * before
    assert run(forks, world, name, processes=3 - before, **settings) == [0] * (3 - before)
    losses, straight = ([row["loss"] for row in logged(world / each)] for each in (name, f"{name}-straight"))
    assert losses == pytest.approx(straight, rel=1e-4)


def failing_child(number: int, count: int, port: int, mark: Path) -> None:
    as_one_of(number, count, port)
    with pytest.raises(UserError, match="no luck") as caught, joined("cpu"), leaving_late(number, mark):
        on_first(fail)
    assert isinstance(caught.value, ToldElsewhere) == (number > 0)
    assert mark.exists()


@contextmanager
def leaving_late(number: int, mark: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if number == 0:
            time.sleep(1)
            mark.touch()


def fail() -> None:
    raise UserError("no luck")


def test_the_others_leave_after_the_first_which_failed(forks: ForkServerContext, tmp_path: Path) -> None:
    assert start(forks, 3, failing_child, tmp_path / "left") == [0, 0, 0]


def test_torchrun_starts_the_command_line(world: Path) -> None:
    """The documented command, and a mistake that every process sees."""
    recipe = world / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(world, *STAGES[1:2], output=str(world / "torchrun"))))
    done = torchrun(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distil step 6/6 loss") == 1
    assert (world / "torchrun" / "distil" / "model" / "model.safetensors").exists()
    again = torchrun(recipe)
    assert again.returncode != 0
    assert again.stderr.count("torchrun' exists: its run of this recipe is finished") == 1


def torchrun(recipe: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hylo", "distill", str(recipe)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def test_uneven_shares_are_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hylo.distill.stages.process_count", lambda: 3)
    values = recipe_values(world, STAGES[0], output=str(world / "uneven"))
    message = r"stage 'align' has 8 sequences in a step .*, which 3 processes cannot share evenly"
    with pytest.raises(UserError, match=message):
        run_recipe(parse_recipe(values), console=Console(file=io.StringIO()))
    assert not (world / "uneven").exists()
