"""Gated delta rule: forward, backward alone, and decode, each with fast and with slow gates."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hylo_ops
from bench import contest
from bench.contest import Contestant, Results, Roofs, Work
from bench.forms import named_gradients
from bench.peers import gated_delta_rule as peers
from bench.peers.gated_delta_rule import DeltaCall, DeltaInputs
from bench.shapes import GATED_DELTA_RULE, GATED_DELTA_RULE_LENGTHS, DeltaCase
from hylo_ops.testing import DTYPE_NAMES

CASES = {case.name: case for case in GATED_DELTA_RULE}
EXTRA_CASES = {case.name: case for case in GATED_DELTA_RULE_LENGTHS}
PEERS = sorted({name for forms in peers.FORMS.values() for name in forms})
BACKENDS = ["cuda", "triton"]
# g = scale * logsigmoid(N(0, 1) + 3): a state forgets within a few chunks, or keeps for thousands of tokens.
GATES = {"fast": 1.0, "slow": 0.01}
SHIFT = 3.0
CHUNK = 64
OUTPUTS = ("o", "final_state")
SECONDS = 0.6  # of the clocks, a row
# Further from float64 than this is another function: bf16 products inside leave 3e-3 to 5e-3.
MAX_ERROR = 5e-2
MAX_EXACT_BYTES = 44e9  # as exact_bytes counts; what torch's solver takes beside comes to 60e9 at most


def draw(case: DeltaCase, gates: str, device: str = "cuda") -> DeltaInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    q, k = (F.normalize(normal(case.B, case.T, case.G, case.K), dim=-1).to(case.dtype) for _ in range(2))
    v = normal(case.B, case.T, case.H, case.V).to(case.dtype)
    # logsigmoid(x + 3) = -softplus(-x - 3): with a = -x and dt_bias = -3 it is the gate of kernels that activate inside
    a, b = (normal(case.B, case.T, case.H).to(case.dtype) for _ in range(2))
    state, state_shape = None, (case.B, case.H, case.K, case.V)
    if case.initial_state or "decode" in case.passes:
        state = (normal(*state_shape) * case.K**-0.5).to(case.state_dtype)
    gradients_of_outputs = normal(*v.shape).to(case.dtype), normal(*state_shape) * case.K**-0.5
    return DeltaInputs(
        q=q,
        k=k,
        v=v,
        g=GATES[gates] * F.logsigmoid(SHIFT - a.float()),
        beta=b.float().sigmoid(),
        state=state,
        output_gradients=gradients_of_outputs,
        a=a,
        b=b,
        a_log=torch.full((case.H,), math.log(GATES[gates]), device=device),
        dt_bias=torch.full((case.H,), -SHIFT, device=device),
    )


def work(case: DeltaCase, pass_: str) -> Work:
    """The counts of the agreed cost model ("Gated DeltaNet kernels on Hopper", section 4), and each state once.

    A multiply and an add are 2 FLOP; chunks of 64. Of a token and a value head:
        forward    6 K V + C (4 K + 4 V) + 2/3 C^2    three products with the state; K K^T, Q K^T; A W, P V; the inverse
        backward  18 K V + C (12 V + 8 K) + 4 C^2     two products to recompute the states, seven in the reverse pass
        decode     7 K V                              decay, read, write, read
    Bytes of a token, every input read and every output written once: q, k, v, o in the inputs' dtype (their gradients
    too), g and beta fp32.
    """
    K, V, C, size = case.K, case.V, CHUNK, case.dtype.itemsize
    tokens, keys, values = case.B * case.T, case.G * K, case.H * V
    state = case.B * case.H * K * V
    if pass_ == "decode":
        moved = tokens * (2 * size * (keys + values) + 8 * case.H) + 2 * state * case.state_dtype.itemsize
        return Work(bytes=moved, flop=7 * state)
    states = 4 * state * (2 if case.initial_state else 1)  # forward: in and out; backward: gradient in and out
    if pass_ == "forward":
        moved = tokens * (2 * size * (keys + values) + 8 * case.H) + states
        flop = tokens * case.H * (6 * K * V + C * (4 * K + 4 * V) + 2 * C * C // 3)
    else:
        moved = tokens * (size * (4 * keys + 3 * values) + 16 * case.H) + states
        moved += 4 * state if case.initial_state else 0  # read again
        flop = tokens * case.H * (18 * K * V + C * (12 * V + 8 * K) + 4 * C * C)
    return Work(bytes=moved, flop=flop)


def exact_bytes(case: DeltaCase) -> float:
    """Peak of the float64 reference with its gradients, fitted to counted allocations within 2 %."""
    doubles = 250 + 10 * (case.K + case.V) + 3 * case.K * case.V / CHUNK  # of a token and a value head
    return 8.0 * case.B * case.T * case.H * doubles


def checked_tokens(case: DeltaCase) -> int:
    """All tokens of a sequence, or as many whole chunks as the float64 reference has memory for."""
    share = MAX_EXACT_BYTES / exact_bytes(case)
    return case.T if share >= 1 else int(share * case.T) // CHUNK * CHUNK


def our_chunk(backend: str, x: DeltaInputs) -> DeltaCall:
    return lambda: hylo_ops.chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, initial_state=x.state, backend=backend)


def our_decode(backend: str, x: DeltaInputs) -> DeltaCall:
    assert x.state is not None
    tensors = (x.q, x.k, x.v, x.g, x.beta, x.state)
    return lambda: (hylo_ops.recurrent_gated_delta_rule(*tensors, backend=backend), tensors[5])


OURS = {"forward": our_chunk, "backward": our_chunk, "decode": our_decode}


def contestant(pass_: str, form: peers.DeltaForm, inputs: DeltaInputs, checked: DeltaInputs) -> Contestant:
    """One of the passes in somebody's form, timed on `inputs` and compared with float64 on `checked`."""
    if pass_ == "backward":
        return Contestant(
            check=lambda: gradients(form, checked),
            start=lambda: partial(pending_backward(form, inputs), retain_graph=True),
            whole=lambda: gradients(form, inputs),  # of forward and backward together
        )
    return Contestant(
        check=lambda: dict(zip(OUTPUTS, form(checked.with_own_states())(), strict=True)),
        start=lambda: form(inputs.with_own_states()),
    )


def pending_backward(form: peers.DeltaForm, inputs: DeltaInputs) -> Callable[..., tuple[Tensor, ...]]:
    """The backward alone, with the forward done: what it gives are the gradients of `differentiable`, in its order."""
    leaves = inputs.leaves()
    wanted = tuple(leaves.differentiable().values())
    return partial(torch.autograd.grad, form(leaves)(), wanted, inputs.output_gradients)


def gradients(form: peers.DeltaForm, inputs: DeltaInputs) -> Results:
    return named_gradients(tuple(inputs.differentiable()), pending_backward(form, inputs)())


def first_call(case: DeltaCase, backend: str, device: str) -> Callable[[], Callable[[], object]]:
    """Draws inputs; what is returned runs the forward on them and returns what runs the backward."""
    return partial(pending_backward, partial(our_chunk, backend), draw(case, "fast", device))


def run(case: DeltaCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """Rows for both gate sets and every pass of the case; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    for gates in GATES:
        inputs = draw(case, gates)
        checked = inputs.first(checked_tokens(case))
        exact = exact_results(case, checked)
        for pass_ in case.passes:
            ours, others = prepare(case, pass_, inputs, checked, exact[pass_], backends, chosen_peers)
            common = {
                "case": case.name,
                "shape": case.shape,
                "dtype": DTYPE_NAMES[case.dtype],
                "state_dtype": DTYPE_NAMES[case.state_dtype],
                "gates": gates,
                "pass": pass_,
                "initial_state": inputs.state is not None,
                "checked_T": checked.v.shape[1],
            }
            # where the host decides: longer calls hide it, and it does the same for all gates
            host = pass_ == "decode" and case.B == 1 and gates == "fast"
            yield from contest.rows(common, ours, others, work(case, pass_), roofs, seconds=SECONDS, host=host)


def exact_results(case: DeltaCase, checked: DeltaInputs) -> dict[str, Results]:
    """What the float64 reference gives for each pass of the case; one forward serves both of the chunked form."""
    doubles = checked.double()
    if "decode" in case.passes:
        return {"decode": contestant("decode", partial(OURS["decode"], "reference"), doubles, doubles).check()}
    leaves = doubles.leaves()
    outputs = OURS["forward"]("reference", leaves)()
    found = torch.autograd.grad(outputs, tuple(leaves.differentiable().values()), doubles.output_gradients)
    return {
        "forward": {name: t.detach() for name, t in zip(OUTPUTS, outputs, strict=True)},
        "backward": named_gradients(tuple(doubles.differentiable()), found),
    }


def prepare(
    case: DeltaCase,
    pass_: str,
    inputs: DeltaInputs,
    checked: DeltaInputs,
    exact: Results,
    backends: list[str],
    chosen_peers: list[str],
) -> tuple[contest.Side, contest.Side]:
    our_forms = {name: partial(OURS[pass_], name) for name in backends}
    peer_forms = {name: form for name, form in peers.FORMS[pass_].items() if name in chosen_peers}
    ours, others = (
        {name: contestant(pass_, form, inputs, checked) for name, form in forms.items()}
        for forms in (our_forms, peer_forms)
    )
    return contest.prepare(f"{case.name}, {pass_}", ours, others, exact, MAX_ERROR)
