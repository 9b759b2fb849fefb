"""What a row runs on, and a function in its library's own form: timed as it is, compared in our form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bench.contest import Contestant, Results, Side, prepare
from bench.timing import Call

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every contestant of a row gets, and the gradients that come in for its outputs.

    A subclass names its fields: those with gradients, those whose dimension 1 is the tokens' (the first output's is
    too), and those that a decode step updates in place. A field of these may be None.
    """

    DIFFERENTIABLE: ClassVar[tuple[str, ...]]
    OF_TOKENS: ClassVar[tuple[str, ...]]
    STATES: ClassVar[tuple[str, ...]] = ()
    output_gradients: Tensors

    def named(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def differentiable(self) -> dict[str, Tensor]:
        return self.named(self.DIFFERENTIABLE)

    @property
    def wants_gradients(self) -> bool:
        return all(tensor.requires_grad for tensor in self.differentiable().values())

    def leaves(self) -> Self:
        """The same memory, with gradients wanted of what has one."""
        wanted: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in self.differentiable().items()}
        return replace(self, **wanted)

    def double(self) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wide: dict[str, Any] = {
            name: value.double()
            for name, value in values.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return replace(self, **{**wide, "output_gradients": tuple(t.double() for t in self.output_gradients)})

    def first(self, tokens: int) -> Self:
        """The same up to so many tokens; itself where there are no more."""
        of_tokens = self.named(self.OF_TOKENS)
        if tokens == next(iter(of_tokens.values())).shape[1]:
            return self
        cut: dict[str, Any] = {name: t[:, :tokens].contiguous() for name, t in of_tokens.items()}
        of_output, *others = self.output_gradients
        return replace(self, **cut, output_gradients=(of_output[:, :tokens].contiguous(), *others))

    def with_own_states(self) -> Self:
        """The same with copies of the states, to be updated in place."""
        copies: dict[str, Any] = {name: t.clone() for name, t in self.named(self.STATES).items()}
        return replace(self, **copies)


@dataclass(frozen=True)
class Run:
    """A function on the inputs of a row, in the form that its library has.

    Args:
        forward: what the clock sees.
        leaves: what `forward` reads and gets gradients, if they are wanted.
        output_gradients: what comes in for what `forward` gives.
        outputs: what `forward` gave in our form, under our names; outside the clock.
        gradients: likewise what the leaves got.
    """

    forward: Callable[[], Tensors]
    leaves: Tensors
    output_gradients: Tensors
    outputs: Callable[[Tensors], Results]
    gradients: Callable[[Tensors], Results]

    def begin(self) -> Callable[[], Tensors]:
        """Runs the forward, and gives the call that runs the backward."""
        return partial(torch.autograd.grad, self.forward(), self.leaves, self.output_gradients)

    def forward_backward(self) -> Tensors:
        return self.begin()()


@dataclass(frozen=True)
class Step:
    """A decode step in the form that its library has.

    Args:
        forward: what the clock sees: it updates the states of the inputs in place.
        outputs: what `forward` gave in our form, the output and then the states; outside the clock.
    """

    forward: Callable[[], Tensors]
    outputs: Callable[[Tensors], Tensors] = tuple


Form = Callable[[Any], Run]  # of the stem's inputs
StepForm = Callable[[Any], Step]


def plain_run(inputs: Inputs, forward: Callable[[], Tensors], names: tuple[str, ...]) -> Run:
    """Of a function that has our form already: it reads the inputs as they are, and gives what `names` says."""
    leaves = inputs.differentiable()
    return Run(
        forward=forward,
        leaves=tuple(leaves.values()),
        output_gradients=inputs.output_gradients,
        outputs=lambda outputs: dict(zip(names, outputs, strict=True)),
        gradients=lambda found: named_gradients(tuple(leaves), found),
    )


def named_gradients(names: tuple[str, ...], found: Tensors) -> Results:
    return {f"d{name}": gradient for name, gradient in zip(names, found, strict=True)}


def contestants(
    pass_: str, of: Mapping[str, Any], inputs: Inputs, checked: Inputs, step_names: tuple[str, ...]
) -> dict[str, Contestant]:
    """A pass in everybody's form: timed on `inputs`, compared with float64 on `checked`.

    Args:
        pass_: forward, forward_backward, or decode.
        of: a Form for each, in decode a StepForm.
        checked: `inputs` itself, or its first tokens.
        step_names: what the results of a decode step are called.
    """
    if pass_ == "decode":
        return {name: _step_contestant(form, step_names, inputs, checked) for name, form in of.items()}
    with_gradients = pass_ == "forward_backward"
    if with_gradients:
        same = checked is inputs
        inputs = inputs.leaves()
        checked = inputs if same else checked.leaves()
    return {name: _contestant(form, inputs, checked, with_gradients) for name, form in of.items()}


def _contestant(form: Form, inputs: Inputs, checked: Inputs, with_gradients: bool) -> Contestant:
    def check() -> Results:
        run = form(checked)
        return run.gradients(run.forward_backward()) if with_gradients else run.outputs(run.forward())

    def start() -> Call:
        run = form(inputs)
        call = run.forward_backward if with_gradients else run.forward
        if checked is not inputs:  # what is beyond the first tokens is not compared, but must be numbers
            assert all(bool(torch.isfinite(t).all()) for t in call()), "gives NaN or Inf after the compared tokens"
        return call

    return Contestant(check=check, start=start)


def _step_contestant(form: StepForm, names: tuple[str, ...], inputs: Inputs, checked: Inputs) -> Contestant:
    """Timed and compared on states of its own."""
    return Contestant(
        check=lambda: step_results(form, names, checked), start=lambda: form(inputs.with_own_states()).forward
    )


def step_results(form: StepForm, names: tuple[str, ...], inputs: Inputs) -> Results:
    step = form(inputs.with_own_states())
    return dict(zip(names, step.outputs(step.forward()), strict=True))


def exact_results(form: Form, checked: Inputs) -> dict[str, Results]:
    """What a form gives in float64 for forward and forward_backward; one forward serves both."""
    run = form(checked.double().leaves())
    outputs = run.forward()
    found = torch.autograd.grad(outputs, run.leaves, run.output_gradients)
    return {
        "forward": {name: t.detach() for name, t in run.outputs(outputs).items()},
        "forward_backward": run.gradients(found),
    }


@dataclass(frozen=True)
class Functions:
    """Who computes a stem: a form over all tokens and a decode step, ours by backend and the peers' by name.

    Args:
        our_step: None where the stem has no decode step.
        step_names: what the results of a decode step are called.
        limit: further from float64 than this, a result is another function's.
    """

    ours: Callable[[str, Any], Run]
    our_step: Callable[[str, Any], Step] | None
    peers: Mapping[str, Form]
    peer_steps: Mapping[str, StepForm]
    step_names: tuple[str, ...]
    limit: float

    def exact(self, pass_names: tuple[str, ...], checked: Inputs) -> dict[str, Results]:
        """What the float64 reference gives, by pass."""
        if "decode" in pass_names:
            step = partial(self.our_step, "reference")
            return {"decode": step_results(step, self.step_names, checked.double())}
        return exact_results(partial(self.ours, "reference"), checked)

    def prepare(
        self,
        what: str,
        pass_: str,
        backends: Sequence[str],
        peers: Sequence[str],
        inputs: Inputs,
        checked: Inputs,
        exact: Results,
    ) -> tuple[Side, Side]:
        """Ours and the peers with their errors, ready for the clocks.

        Raises:
            AssertionError: a backend of ours is further from `exact` than the limit; it begins with `what`.
        """
        decode = pass_ == "decode"
        sides: tuple[dict[str, Any], dict[str, Any]] = (
            {name: partial(self.our_step if decode else self.ours, name) for name in backends},
            {name: form for name, form in (self.peer_steps if decode else self.peers).items() if name in peers},
        )
        ours, others = (contestants(pass_, side, inputs, checked, self.step_names) for side in sides)
        return prepare(f"{what}, {pass_}", ours, others, exact, self.limit)


def leaf(tensor: Tensor, like: Inputs) -> Tensor:
    """The same memory, with a gradient wanted if the inputs want theirs."""
    return tensor.detach().requires_grad_(like.wants_gradients)


def widened(tensor: Tensor, heads: int) -> Tensor:
    """[B, T, some heads, ...] repeated to so many; itself if there are as many."""
    present = tensor.shape[2]
    return tensor.detach() if present == heads else tensor.detach().repeat_interleave(heads // present, dim=2)


def narrowed(gradient: Tensor, heads: int) -> Tensor:
    """The gradient of what was `widened` from so many heads: summed over the repeats in fp32, rounded no more."""
    if gradient.shape[2] == heads:
        return gradient
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.unflatten(2, (heads, -1)).sum(3)
