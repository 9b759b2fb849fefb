"""Which backends an op has, in order of preference, and the reason why one cannot run given inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

WhyNot = Callable[..., str | None]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        name: what the caller writes as `backend=`.
        why_not: called with the op's arguments; the reason why it cannot run them, or None.
        forward: called with the op's arguments, without `backend`.
        backward: called with the list of output gradients, the list of what the forward saved for it where the op has
            that, and the op's arguments; gives one gradient for each differentiable input that is a tensor. None:
            inference only.
        backward_why_not: the reason why it cannot run their backward, or None; `why_not` where that is the same.
    """

    name: str
    why_not: WhyNot
    forward: Callable[..., Any]
    backward: Callable[..., list[Tensor]] | None = None
    backward_why_not: WhyNot | None = None


def choose(op: str, backends: Sequence[Backend], requested: str | None, arguments: dict[str, Any]) -> Backend:
    """The first backend that supports the arguments; a requested one runs or says why it cannot.

    One that is the fastest for some arguments only is listed once more where it is the next best for others.
    """
    reasons = []
    for backend in backends:
        if requested is not None and backend.name != requested:
            continue
        reason = backend.why_not(**arguments)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    if not reasons:
        known = list(dict.fromkeys(backend.name for backend in backends))
        raise NotImplementedError(f"{op} has no backend {requested!r}; it has {known}")
    raise NotImplementedError(f"{op} cannot run these inputs on {'; '.join(dict.fromkeys(reasons))}")
