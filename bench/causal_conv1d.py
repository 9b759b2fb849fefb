"""Short causal convolution: forward, forward and backward together, and decode."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, forms
from bench.contest import Roofs, Work
from bench.forms import Run, Step, Tensors
from bench.peers import causal_conv1d as peers
from bench.peers.causal_conv1d import OUTPUTS, ConvInputs
from bench.shapes import CAUSAL_CONV1D, ConvCase
from hylo_ops.testing import DTYPE_NAMES

CASES = {case.name: case for case in CAUSAL_CONV1D}
PEERS = list(peers.FORMS)
BACKENDS = ["triton"]
ACTIVATION = "silu"
STEP_OUTPUTS = ("y", "newest")
SECONDS = 0.6  # of the clocks, a row
MAX_ERROR = 2e-2  # further from float64 than this is another function
MAX_EXACT_BYTES = 44e9  # as exact_bytes counts
CUT = 4096  # tokens


def draw(case: ConvCase, device: str = "cuda") -> ConvInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    return ConvInputs(
        x=normal(case.B, case.T, case.D),
        weight=normal(case.D, case.W) * case.W**-0.5,
        bias=normal(case.D),
        state=normal(case.B, case.D, case.W) if "decode" in case.passes else None,
        output_gradients=(normal(case.B, case.T, case.D),),
    )


def work(case: ConvCase, pass_: str) -> Work:
    """Each input read once, each output written once, in the inputs' dtype.

    Of an element, W multiply-adds, the bias, and exp, add, divide and product of silu. The backward computes these
    again, silu's slope (4 more), W multiply-adds for the gradient of x and W for that of the weight, and a sum for that
    of the bias. A decode step moves the state besides.
    """
    size, elements, parameters = case.dtype.itemsize, case.B * case.T * case.D, case.D * (case.W + 1)
    numbers, flop = 2 * elements + parameters, 2 * case.W + 5
    if pass_ == "decode":
        numbers += 2 * elements * case.W
    if pass_ == "forward_backward":
        numbers += 3 * elements + 2 * parameters  # x, dy, dx
        flop += 2 * case.W + 5 + 4 + 4 * case.W + 1
    return Work(bytes=numbers * size, flop=flop * elements)


def exact_bytes(case: ConvCase) -> float:
    """Peak of the float64 reference with its gradients, as counted from its allocations."""
    return 8.0 * case.B * case.T * case.D * (5 + 2 * case.W)


def checked_tokens(case: ConvCase) -> int:
    """All tokens of a sequence, or as many times CUT as the float64 reference has memory for."""
    share = MAX_EXACT_BYTES / exact_bytes(case)
    return case.T if share >= 1 else int(share * case.T) // CUT * CUT


def our_convolution(backend: str, inputs: ConvInputs) -> Run:
    """Its last state is made, as always, and has no gradient coming in."""
    i = inputs

    def forward() -> Tensors:
        y, _ = hylo_ops.causal_conv1d(i.x, i.weight, i.bias, activation=ACTIVATION, backend=backend)
        return (y,)

    return forms.plain_run(inputs, forward, OUTPUTS)


def our_step(backend: str, inputs: ConvInputs) -> Step:
    i, state = inputs, inputs.state
    assert state is not None

    def forward() -> Tensors:
        y = hylo_ops.recurrent_causal_conv1d(i.x, i.weight, i.bias, state, activation=ACTIVATION, backend=backend)
        return y, peers.newest(state)

    return Step(forward)


FUNCTIONS = forms.Functions(
    our_convolution, our_step, peers.FORMS, peers.STEPS, step_names=STEP_OUTPUTS, limit=MAX_ERROR
)


def first_call(case: ConvCase, backend: str, device: str) -> Callable[[], Callable[[], object]]:
    """Draws inputs; what is returned runs the forward on them and returns what runs the backward."""
    return our_convolution(backend, draw(case, device).leaves()).begin


def run(case: ConvCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """A row for every pass of the case; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    inputs = draw(case)
    checked = inputs.first(checked_tokens(case))
    exact = FUNCTIONS.exact(case.passes, checked)
    for pass_ in case.passes:
        ours, others = FUNCTIONS.prepare(case.name, pass_, backends, chosen_peers, inputs, checked, exact[pass_])
        common = {
            "case": case.name,
            "shape": case.shape,
            "dtype": DTYPE_NAMES[case.dtype],
            "state_dtype": DTYPE_NAMES[case.dtype] if pass_ == "decode" else None,
            "gates": ACTIVATION,
            "pass": pass_,
            "checked_T": checked.x.shape[1],
        }
        host = pass_ == "decode" and case.B == 1
        yield from contest.rows(common, ours, others, work(case, pass_), roofs, seconds=SECONDS, host=host)
