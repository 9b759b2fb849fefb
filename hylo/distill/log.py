"""What a run tells: a JSONL line a log step, a progress bar or plain lines, TensorBoard where asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hylo.atomic import full_disk_is_a_user_error, write_text_atomically
from hylo.errors import UserError

LOG_FILE = "log.jsonl"


def rewind_log(path: Path, earlier_stages: list[str], stage: str, step: int) -> None:
    """Drop every line after `step` of `stage`, so that the steps to be repeated are not logged twice."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut short
        if row["stage"] in earlier_stages or (row["stage"] == stage and row["step"] <= step):
            kept.append(line + "\n")
    write_text_atomically(path, "".join(kept))


def open_board(directory: Path, wanted: bool) -> Any:
    """A TensorBoard writer, or None where the recipe does not ask for one.

    Raises:
        UserError: asked for, but not installed.
    """
    if not wanted:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "the recipe says 'tensorboard: true' but tensorboard is missing: pip install 'hylo[tensorboard]'"
        ) from None
    return SummaryWriter(str(directory))


class StageLog:
    """Reports one stage: `step_done` every step, with values on the steps that are logged.

    Speed is in tokens per second since the last logged step. The JSONL keys are stage, step, loss, lr, grad_norm,
    tokens (of the stage so far), tokens_per_second and seconds (of this process in the stage). Without `output` no
    line is kept: one of several processes writes them.
    """

    def __init__(
        self,
        output: Path | None,
        stage: str,
        *,
        steps: int,
        start: int,
        tokens_per_step: int,
        board: Any,
        console: Console,
    ) -> None:
        self.path = None if output is None else output / LOG_FILE
        self.stage, self.steps, self.tokens_per_step = stage, steps, tokens_per_step
        self.board, self.console = board, console
        self.begin = self.last_time = time.perf_counter()
        self.last_step = start
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(stage, total=steps, completed=start, values="")

    def __enter__(self) -> StageLog:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def step_done(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def write(self, step: int, *, loss: float, lr: float, grad_norm: float) -> None:
        """Log the values of `step` (counted from 1)."""
        now = time.perf_counter()
        speed = (step - self.last_step) * self.tokens_per_step / max(now - self.last_time, 1e-9)
        self.last_time, self.last_step = now, step
        values = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": speed}
        row = {"stage": self.stage, "step": step, "tokens": step * self.tokens_per_step, **values}
        row["seconds"] = now - self.begin
        if self.path is not None:
            with full_disk_is_a_user_error(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{self.stage}/{name}", value, step)
            self.board.flush()
        left = (self.steps - step) * self.tokens_per_step / speed
        self.bar.update(self.task, values=f"loss {loss:.4f}  {speed:,.0f} tokens/s")
        if not self.console.is_terminal:
            self.console.print(
                f"{self.stage} step {step}/{self.steps} loss {loss:.4f} lr {lr:.3g} "
                f"{speed:,.0f} tokens/s {left:,.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
