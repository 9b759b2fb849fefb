"""The training loop of one stage: plain PyTorch, each process on one device with its share of every step's sequences.

How parameters lie on devices is known to `shards` alone, and how processes talk to `processes`.
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
    load_progress,
    load_tensors,
    random_states,
    restore_random_state,
    save_checkpoint,
    saved_names,
    seed_everything,
)
from hylo.distill.data import Batches
from hylo.distill.log import StageLog
from hylo.distill.objectives import completed_parts, loss_terms
from hylo.distill.processes import anywhere, from_first, mean_of_all, process_count, process_number
from hylo.distill.recipe import CeStage, IldStage, KlStage
from hylo.distill.recomputing import recompute_layers
from hylo.distill.shards import exchange_gradients, own_parts, whole_value
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
        if not self.bf16:
            return nullcontext()
        # What a cut-up model gathers for a layer goes with the layer; casts kept until the end of a pass would stay.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=process_count() == 1)

    def sequences(self, step: int) -> Tensor:
        """This process's share of the step's sequences; those of all processes are the batch of a single one."""
        return self.batches.batch(step).chunk(process_count())[process_number()]


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
                value = _finite(mean_of_all(loss), stage.name, done)
                log.write(done, loss=value, lr=rate, grad_norm=norm.item())
            stopping = anywhere(stop.requested)
            if stopping or done % stage.checkpoint_every == 0:
                _save(job, optimizer, done)
            if stopping:
                raise SystemExit(EXIT_TERMINATED)


def make_optimizer(stage: IldStage | KlStage | CeStage, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=stage.learning_rate,
        betas=stage.betas,
        weight_decay=stage.weight_decay,
        # On a GPU the other ways make the roots of all second moments at once; on a CPU fused rounds otherwise.
        fused=parameters[0].is_cuda,
    )


def spare_memory(stage: IldStage | KlStage | CeStage, student: nn.Module, teacher: nn.Module | None) -> None:
    """Make the models trade time for memory as the stage says (docs/distillation.md).

    Checkpointing is of whole layers, mixer and MLP, so nothing but the layers' inputs waits for the backward, and what
    attention returned where it is selective.
    """
    if not isinstance(stage, IldStage) and stage.activation_checkpointing:
        recompute_layers(student, keep_attention=stage.activation_checkpointing == "selective")
    if stage.mlp_tile_tokens is not None:
        for model in (student, teacher):
            if model is not None:
                tile_mlps(model, stage.mlp_tile_tokens)


def train_step(
    job: StageJob, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int, rate: float
) -> tuple[Tensor, Tensor]:
    """One optimiser step. Returns loss (mean over this process's sequences) and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=job.device)
    sequences = job.sequences(step)
    pieces = sequences.split(job.stage.batch_size)
    exchange_gradients([job.student], False)
    for rows in pieces:
        share = len(rows) / len(sequences)
        input_ids = rows.to(job.device, non_blocking=True)
        terms = loss_terms(job.stage, job.student, job.teacher, input_ids, job.autocast)
        for term, parts in zip(terms, completed_parts(job.stage, job.student), strict=True):
            exchange_gradients(parts, rows is pieces[-1])
            (term * share).backward()
            total += term.detach() * share
    norm = _clip(parameters, job.stage.grad_clip)
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
    step = from_first(last_step(job.checkpoints))
    if step == 0:
        seed_everything(job.seed)
        return 0
    progress = load_progress(job.checkpoints, step)
    _expect_state(job.student, optimizer, saved_names(job.checkpoints, step))
    load_tensors(job.checkpoints, step, _tensors(job.student, optimizer))
    # Processes that were not there yet draw other numbers than any before.
    restore_random_state(progress["random"], job.seed + step)
    return step


def _save(job: StageJob, optimizer: torch.optim.Optimizer, step: int) -> None:
    progress = {
        "stage": job.stage.name,
        "step": step,
        "sequences": step * job.batches.sequences_per_step,
        "random": random_states(),
    }
    save_checkpoint(job.checkpoints, step, _tensors(job.student, optimizer), progress, keep=job.keep_checkpoints)


def _tensors(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimiser state as a checkpoint names them; what else an optimiser has follows from recipe and step."""
    tensors = {}
    for name, tensor in own_parts(student).items():
        tensors[f"model.{name}"] = tensor.detach()
        for key, value in optimizer.state.get(tensor, {}).items():
            tensors[_state_name(name, key)] = value
    return tensors


def _expect_state(student: nn.Module, optimizer: torch.optim.Optimizer, saved: set[str]) -> None:
    """Make room for the optimiser state that was saved: parameters without a gradient have none."""
    for name, tensor in own_parts(student).items():
        if _state_name(name, "step") in saved:
            moments = {key: torch.zeros_like(tensor.detach()) for key in ("exp_avg", "exp_avg_sq")}
            # A fused step counts on the device, as it would itself.
            device = tensor.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[tensor] = {"step": torch.zeros((), device=device), **moments}


def _state_name(parameter: str, key: str) -> str:
    return f"optimizer.{parameter}.{key}"


def _clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients down to a norm of `limit`, if it is given; returns the norm that they had."""
    norm = whole_value(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _finite(loss: Tensor, stage: str, step: int) -> float:
    value = float(loss.item())
    if not math.isfinite(value):
        raise UserError(f"the loss of stage '{stage}' is {value} at step {step}: lower its learning_rate")
    return value
