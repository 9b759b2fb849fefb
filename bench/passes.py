"""The rows of a stem without states and gates: one for each pass of a case and each backend of ours."""

from collections.abc import Callable, Iterator
from typing import Any

from bench import contest, forms
from bench.contest import Roofs, Work


def rows(
    case: Any,
    functions: forms.Functions,
    inputs: forms.Inputs,
    work: Callable[[Any, str], Work],
    backends: list[str],
    chosen_peers: list[str],
    roofs: Roofs,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    exact = functions.exact(case.passes, inputs)
    for pass_ in case.passes:
        ours, others = functions.prepare(case.name, pass_, backends, chosen_peers, inputs, inputs, exact[pass_])
        common = contest.described(case, pass_)
        yield from contest.rows(common, ours, others, work(case, pass_), roofs, seconds=seconds, host=False)
