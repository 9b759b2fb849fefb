"""Models with random weights, made where they run."""

from collections.abc import Callable
from typing import TypeVar

import torch

Model = TypeVar("Model", bound=torch.nn.Module)


def on_device(make: Callable[[], Model], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Model:
    """The same weights each time, in `dtype` from the beginning: no copy of another width ever exists."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(previous)
