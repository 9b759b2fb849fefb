"""Decode steps in a row on a GPU, whose kernels begin while those ahead of them still run: they must give the bits that
kernels give one by one, eagerly and in a graph, again and again."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hylo_ops import skinny_linear

Run = Callable[[], list[Tensor]]
Between = Callable[[], object]  # what the host does after each launch
Step = Callable[[Tensor, dict[str, Tensor], bool], Tensor]

_STEPS, _REPEATS = 8, 200


def check_chain(step: Step, x: Tensor, weights: list[Tensor], states: list[dict[str, Tensor]], settled: bool) -> None:
    """Layers of a product and a step of what it gives.

    Args:
        step: of a product [B, 1, N], the states of a layer and whether they are settled; gives [B, 1, D].
        x: [B, 1, D], what the first product is of.
        weights: [N, D] of each layer.
        states: of each layer by name; the step updates them.
    """
    every = [state for layer in states for state in layer.values()]
    reset, stream = _restoring(every), torch.empty_like(x)

    def run(settled: bool, between: Between) -> list[Tensor]:
        reset()
        # No kernel begins early here, so those that restore the states end before the first product.
        y = stream.copy_(x)
        for weight, layer in zip(weights, states, strict=True):
            projected = skinny_linear(y, weight, constant_weight=True)
            between()
            y = step(projected, layer, settled)
            between()
        return [y.clone(), *(state.clone() for state in every)]

    check_runs(partial(run, False, torch.cuda.synchronize), partial(run, settled, _nothing))


def check_one_state(step: Callable[[], Tensor], states: list[Tensor]) -> None:
    """Steps on the same states, which are not settled: the kernel ahead still writes them."""
    reset = _restoring(states)

    def run(between: Between) -> list[Tensor]:
        reset()
        results = []
        for _ in range(_STEPS):
            results.append(step())
            between()
        return [*results, *(state.clone() for state in states)]

    check_runs(partial(run, torch.cuda.synchronize), partial(run, _nothing))


def _restoring(states: list[Tensor]) -> Callable[[], None]:
    """A function that makes the states again what they are now."""
    start = [state.clone() for state in states]

    def reset() -> None:
        for state, first in zip(states, start, strict=True):
            state.copy_(first)

    return reset


def _nothing() -> None:
    pass


def check_runs(one_by_one: Run, at_once: Run) -> None:
    """`at_once` gives the bits of `one_by_one`, eagerly and in a graph."""
    expected = one_by_one()
    assert all(t.isfinite().all() for t in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = at_once()
    for _ in range(_REPEATS):
        graph.replay()
        for found in (captured, at_once()):
            assert all(torch.equal(got, want) for got, want in zip(found, expected, strict=True))
