"""The training loop of one stage: plain PyTorch, one process, one device.

`place_model` and `whole_state` are the only two places that know how parameters lie on devices; sharding (FSDP2)
enters there and is not implemented.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hylo.distill.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    seed_everything,
)
from hylo.distill.data import Batches
from hylo.distill.log import StageLog
from hylo.distill.objectives import loss_terms
from hylo.distill.recipe import CeStage, IldStage, KlStage
from hylo.distill.tiling import tile_mlps
from hylo.errors import UserError

EXIT_TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class StageJob:
    """One stage made concrete: models on their device, data, length in optimiser steps, where state is kept."""

    stage: IldStage | KlStage | CeStage
    student: nn.Module
    teacher: nn.Module | None
    batches: Batches
    steps: int
    checkpoints: Path
    keep_checkpoints: int
    seed: int
    bf16: bool
    device: torch.device

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def place_model(model: nn.Module, device: torch.device) -> nn.Module:
    """Put a model where it trains. A sharded run wraps the decoder layers here."""
    return model.to(device)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The unsharded state dict, as saved. A sharded run gathers here."""
    return dict(model.state_dict())


def last_step(checkpoints: Path) -> int:
    """The step to resume from: that of the newest complete checkpoint, else 0."""
    return max(checkpoint_steps(checkpoints), default=0)


def train_stage(job: StageJob, open_log: Callable[[int], StageLog]) -> None:
    """Train to the stage's last step, from the newest checkpoint if there is one.

    Args:
        open_log: makes the stage's log, given the step it starts from.
    Raises:
        UserError: the loss is not finite, or the disk is full.
        SystemExit: with 143 after SIGTERM, once the state is saved.
    """
    stage, student = job.stage, job.student
    spare_memory(stage, student.train(), job.teacher)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(stage, parameters)
    start = _restore(job, optimizer)
    with open_log(start) as log, StopSignal() as stop:
        for step in range(start, job.steps):
            rate = learning_rate(stage, step, job.steps)
            loss, norm = train_step(job, optimizer, parameters, step, rate)
            done = step + 1
            log.step_done(done)
            if done % stage.log_every == 0 or done in (1, job.steps):
                log.write(done, loss=_finite(loss, stage.name, done), lr=rate, grad_norm=norm.item())
            if stop.requested or done % stage.checkpoint_every == 0:
                _save(job, optimizer, done)
            if stop.requested:
                raise SystemExit(EXIT_TERMINATED)


def make_optimizer(stage: IldStage | KlStage | CeStage, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay)


def spare_memory(stage: IldStage | KlStage | CeStage, student: nn.Module, teacher: nn.Module | None) -> None:
    """Make the models trade time for memory as the stage says (docs/distillation.md).

    Checkpointing is of whole layers, mixer and MLP, so nothing but the layers' inputs waits for the backward.
    """
    if not isinstance(stage, IldStage) and stage.activation_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    if stage.mlp_tile_tokens is not None:
        for model in (student, teacher):
            if model is not None:
                tile_mlps(model, stage.mlp_tile_tokens)


def train_step(
    job: StageJob, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int, rate: float
) -> tuple[Tensor, Tensor]:
    """One optimiser step. Returns loss (mean over the micro-batches) and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=job.device)
    share = 1 / job.stage.gradient_accumulation
    for rows in job.batches.batch(step).split(job.stage.batch_size):
        input_ids = rows.to(job.device, non_blocking=True)
        for term in loss_terms(job.stage, job.student, job.teacher, input_ids, job.autocast):
            (term * share).backward()
            total += term.detach() * share
    limit = math.inf if job.stage.grad_clip is None else job.stage.grad_clip
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.step()
    return total, norm


def learning_rate(stage: IldStage | KlStage | CeStage, step: int, steps: int) -> float:
    """Rate of optimiser step `step` (from 0): linear warm-up, then constant or cosine towards 0."""
    warmup = math.ceil(stage.warmup_ratio * steps)
    if step < warmup:
        return stage.learning_rate * (step + 1) / warmup
    if stage.schedule == "constant":
        return stage.learning_rate
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class StopSignal:
    """While active, SIGTERM asks the loop to stop after its step. Elsewhere than in the main thread it does nothing."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopSignal:
        if self._active:
            self._before = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGTERM, self._before)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def _restore(job: StageJob, optimizer: torch.optim.Optimizer) -> int:
    step = last_step(job.checkpoints)
    if step == 0:
        seed_everything(job.seed)
        return 0
    state = load_checkpoint(job.checkpoints, step)
    job.student.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restore_random_state(state["random"])
    return step


def _save(job: StageJob, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "step": step,
        "sequences": step * job.batches.sequences_per_step,
        "model": whole_state(job.student),
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
    }
    save_checkpoint(job.checkpoints, step, state, keep=job.keep_checkpoints)


def _finite(loss: Tensor, stage: str, step: int) -> float:
    value = float(loss.item())
    if not math.isfinite(value):
        raise UserError(f"the loss of stage '{stage}' is {value} at step {step}: lower its learning_rate")
    return value
