"""Training steps at true dims with random weights: cases out of recipes, and the engine's own step of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hylo.distill.data import Batches
from hylo.distill.engine import StageJob, make_optimizer, spare_memory, train_step
from hylo.distill.recipe import Recipe, load_recipe
from hylo.memory import stage_job

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Case:
    """A stage of a recipe, with changes as `--set` has them; two micro-batches a step unless they say otherwise."""

    recipe: str
    stage: int
    changes: dict[str, Any]

    def load(self) -> Recipe:
        elsewhere = {"mixer": "student.upcycle.mixer", "precision": "precision"}
        changes = {"gradient_accumulation": 2, **self.changes}
        values = {elsewhere.get(key, f"stages.{self.stage}.{key}"): value for key, value in changes.items()}
        path = RECIPES / f"{self.recipe}.yaml"
        return load_recipe(path, overrides=[f"{key}={json.dumps(value)}" for key, value in values.items()])


@dataclass(frozen=True)
class Steps:
    """A stage's models, data and optimiser, ready for steps."""

    job: StageJob
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]

    def run(self, step: int) -> tuple[Tensor, Tensor]:
        """Optimiser step `step`, from 0: its loss and gradient norm."""
        return train_step(self.job, self.optimizer, self.parameters, step, self.job.stage.learning_rate)


def random_steps(recipe: Recipe, index: int, device: torch.device, count: int) -> Steps:
    """Steps of stage `index` as `hylo distill` runs them: fp32 student and optimiser, teacher in the stage's dtype."""
    dims = stage_job(recipe, index)
    stage = recipe.stages[index]
    torch.manual_seed(0)
    student = _random_model(dims.student, torch.float32, device).train()
    teacher = None
    if dims.teacher is not None:
        dtype = torch.bfloat16 if dims.half else torch.float32
        teacher = _random_model(dims.teacher, dtype, device).eval().requires_grad_(False)
    spare_memory(stage, student, teacher)
    parameters = list(student.parameters())
    rows = stage.sequences_per_step
    tokens = np.arange(rows * dims.length, dtype=np.uint32) % dims.student.vocab_size
    job = StageJob(
        stage=stage, student=student, teacher=teacher,
        batches=Batches(tokens, length=dims.length, sequences_per_step=rows, seed=0), steps=count,
        checkpoints=Path(), keep_checkpoints=1, seed=0, bf16=dims.half, device=device,
    )  # fmt: skip
    return Steps(job, make_optimizer(stage, parameters), parameters)


def most_bytes() -> int:
    """Allocated on the GPU at one time since the last call."""
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def _random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    with device:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model
