"""The processes of one run: a single one, or as many as torchrun started, each with a share of every batch.

All run the same code. What is outside of them (directories, logs, data on disk) is the first one's alone, and an error
there ends all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hylo.errors import ToldElsewhere

T = TypeVar("T")
# The others wait while the first one packs a corpus or upcycles a base, which can take hours.
PATIENCE = timedelta(hours=24)


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_number() -> int:
    """From 0, the first one."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_number() -> int:
    """This process's number on its host, as torchrun gives it: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Join the other processes that torchrun started, if it did; leave them at the end.

    Args:
        device: of the recipe: "auto", "cpu" or "cuda".
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_gpus = device != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    except ToldElsewhere:
        # torchrun ends all as soon as one ends, and the first has to tidy up and to tell. Nothing comes: this fails
        # once it has left.
        with suppress(RuntimeError):
            dist.recv(torch.zeros(1), src=0)
        raise
    finally:
        dist.destroy_process_group()


def on_first(work: Callable[[], T]) -> T | None:
    """Run `work` in the first process while the others wait; its result, and None in the others.

    Raises:
        ToldElsewhere: in the others, where `work` failed; the first one raises what it was.
    """
    if process_count() == 1:
        return work()
    failure: Exception | None = None
    result: T | None = None
    if process_number() == 0:
        try:
            result = work()
        except Exception as error:
            failure = error
    message = from_first(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if message is not None:
        raise ToldElsewhere(message)
    return result


def from_first(value: T) -> T:
    """The first process's `value`, in every process."""
    if process_count() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    shared: T = box[0]
    return shared


def of_all(value: T) -> list[T]:
    """The `value` of every process, in their order."""
    if process_count() == 1:
        return [value]
    box: list[Any] = [None] * process_count()
    dist.all_gather_object(box, value)
    return box


def mean_of_all(x: Tensor) -> Tensor:
    """The mean of the processes' `x`, on its device; `x` itself is left alone."""
    if process_count() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / process_count()


def anywhere(condition: bool) -> bool:
    """Whether `condition` holds in some process."""
    if process_count() == 1:
        return condition
    count = torch.tensor(int(condition))
    dist.all_reduce(count)
    return bool(count)
