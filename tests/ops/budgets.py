"""An operator of one tensor against float64: its result and its gradient no further off than twice eager PyTorch's."""

from collections.abc import Callable

import torch
from torch import Tensor

from hylo_ops.testing import cast, gradients, within_budget


def check_within_budget(ours: Callable[..., Tensor], eager: Callable[..., Tensor], x: dict[str, Tensor]) -> Tensor:
    """The result of `ours`. x: the tensor by its name; the projection's numbers are bfloat16's, so that no dtype rounds
    a gradient that comes in."""
    ((name, given),) = x.items()
    wide = cast(x, torch.float64)
    y = ours(**x)
    assert y.dtype == given.dtype
    within_budget(y, eager(**x), eager(**wide), "y")
    found, theirs, exact = (
        gradients(function, inputs, [name], torch.bfloat16)[name]
        for function, inputs in ((ours, x), (eager, x), (eager, wide))
    )
    assert found.dtype == given.dtype
    within_budget(found, theirs, exact, f"d{name}")
    return y
