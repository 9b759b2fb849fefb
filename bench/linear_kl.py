"""The head's losses: forward and backward together, as training has them. `python -m bench linear_kl`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest
from bench.contest import Contestant, Results, Roofs, Work
from bench.peers import linear_kl as peers
from bench.peers.linear_kl import NAMES, Form, HeadInputs, Step, step
from bench.shapes import LINEAR_KL, HeadCase
from hylo_ops.testing import DTYPE_NAMES, relative_error

CASES = {case.name: case for case in LINEAR_KL}
PEERS = peers.FORMS
BACKENDS = ["triton", "chunked"]
SECONDS = 2.0
LOGIT = 3.0  # standard deviation
# Further from float64 than this, ours is wrong, and a peer computes something else. Theirs may round logits to 16 bits.
MAX_ERROR, MAX_PEER_ERROR = 5e-3, 1e-1


def draw(case: HeadCase, device: str = "cuda") -> HeadInputs:
    """Heads that make logits of one size; a teacher whose distribution is another's than the student's."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(rows: int, width: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(rows, width, generator=generator, device=device)).to(case.dtype)

    student = {
        "hidden": normal(case.N, case.D).requires_grad_(),
        "weight": normal(case.V, case.D, LOGIT * case.D**-0.5).requires_grad_(),
    }
    if case.DT is None:
        targets = torch.randint(case.V, (case.N,), generator=generator, device=device)
        return HeadInputs(**student, targets=targets)
    return HeadInputs(
        **student,
        teacher_hidden=normal(case.N, case.DT),
        teacher_weight=normal(case.V, case.DT, LOGIT * case.DT**-0.5),
    )


def work(case: HeadCase) -> Work:
    """Logits of both models and the student's two gradients; inputs read once, gradients written once."""
    teacher = case.DT or 0
    numbers = 2 * (case.N + case.V) * case.D + (case.N + case.V) * teacher
    return Work(bytes=numbers * case.dtype.itemsize, flop=case.N * case.V * (6 * case.D + 2 * teacher))


def ours(backend: str, inputs: HeadInputs) -> Step:
    i = inputs

    def loss() -> Tensor:
        if i.teacher_hidden is None or i.teacher_weight is None:
            assert i.targets is not None
            return hylo_ops.linear_cross_entropy(i.hidden, i.weight, i.targets, backend=backend)
        return hylo_ops.linear_kl(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, backend=backend)

    return step(inputs, loss)


def exact_results(inputs: HeadInputs) -> Results:
    """In float64, in chunks: the reference's logits of all tokens would not fit."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or not tensor.is_floating_point() else tensor.detach().double()

    wide: dict[str, Any] = {name: double(getattr(inputs, name)) for name in inputs.__dataclass_fields__}
    for name in ("hidden", "weight"):
        wide[name].requires_grad_()
    return _named(ours("chunked", HeadInputs(**wide)))


def _named(call: Step) -> Results:
    return dict(zip(NAMES, call(), strict=True))


def contestants(forms: Mapping[str, Form], inputs: HeadInputs) -> dict[str, Contestant]:
    return {
        name: Contestant(
            check=lambda form=form: _named(form(inputs)),  # type: ignore[misc]
            start=partial(form, inputs),
        )
        for name, form in forms.items()
    }


def within_limit(exact: Results, what: str) -> Callable[[Results], None]:
    """Raises AssertionError where a result is further from the exact one than MAX_ERROR."""

    def accept(results: Results) -> None:
        for name, result in results.items():
            error = relative_error(result, exact[name])
            assert error <= MAX_ERROR, f"{what}: error {error:.1e} of {name}"

    return accept


def run(case: HeadCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> list[dict[str, Any]]:
    """Correctness first, then the clocks.

    Raises:
        AssertionError: our result is further from float64 than MAX_ERROR.
    """
    inputs = draw(case)
    exact = exact_results(inputs)
    mine = contestants({name: partial(ours, name) for name in backends}, inputs)
    theirs = contestants({name: PEERS[name] for name in chosen_peers}, inputs)
    sides = (
        contest.prepare_ours(mine, exact, within_limit(exact, case.name)),
        contest.prepare_peers(theirs, exact, MAX_PEER_ERROR),
    )
    common = {
        "case": case.name,
        "shape": case.shape,
        "dtype": DTYPE_NAMES[case.dtype],
        "state_dtype": None,
        "gates": "cross_entropy" if case.DT is None else "kl",
        "pass": "forward_backward",
    }
    del exact
    return list(contest.rows(common, *sides, work(case), roofs, seconds=SECONDS, host=False))
