"""AdamW on a GPU: a step makes nothing beside its state, and a run goes on from a checkpoint as if it never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hylo.distill import engine as engine_module
from hylo.distill import parse_recipe, run_recipe
from hylo.distill.engine import make_optimizer
from tests.distill_fixtures import make_world, quiet, recipe_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
STAGE = {"name": "ce", "kind": "ce", "steps": 8, "checkpoint_every": 4, "learning_rate": 1e-2}


def test_a_step_needs_no_room(tmp_path: Path) -> None:
    (stage,) = parse_recipe(recipe_values(tmp_path, STAGE)).stages
    parameters = [nn.Parameter(torch.randn(1 << 20, device="cuda")) for _ in range(16)]
    optimizer = make_optimizer(stage, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < parameters[0].nbytes


def test_a_run_that_died_ends_as_one_that_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps taken are part of the state: begun anew, the first ones would be larger."""
    world = make_world(tmp_path)
    results = {}
    for name in ("whole", "resumed"):
        recipe = parse_recipe(recipe_values(world, STAGE, output=str(world / name), device="cuda"))
        if name == "resumed":
            with monkeypatch.context() as patch:
                patch.setattr(engine_module, "train_step", dying(engine_module.train_step, at=5))
                with pytest.raises(RuntimeError, match="power is out"):
                    run_recipe(recipe, console=quiet())
        directory = run_recipe(recipe, resume=name == "resumed", console=quiet())
        assert directory is not None
        results[name] = load_file(directory / "model.safetensors")
    for key, weight in results["whole"].items():
        torch.testing.assert_close(results["resumed"][key], weight, rtol=1e-4, atol=1e-5)


def dying(train_step: Any, *, at: int) -> Any:
    def step(job: Any, *arguments: Any) -> Any:
        if arguments[2] == at:
            raise RuntimeError("the power is out")
        return train_step(job, *arguments)

    return step
