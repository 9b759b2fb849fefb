"""Mamba2's scan: forward, forward and backward together, and decode."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hylo_ops
from bench import contest, forms
from bench.contest import Roofs, Work
from bench.forms import Run, Step, Tensors
from bench.peers import ssd as peers
from bench.peers.ssd import OUTPUTS, ScanInputs
from bench.shapes import SSD, SSD_LENGTHS, ScanCase
from hylo_ops.testing import DTYPE_NAMES

CASES = {case.name: case for case in SSD}
EXTRA_CASES = {case.name: case for case in SSD_LENGTHS}
PEERS = [*peers.FORMS, *(name for name in peers.STEPS if name not in peers.FORMS)]
BACKENDS = ["cuda", "triton"]
# Least and greatest step, log-uniform between, and least and greatest -a, uniform between: a layer as it is trained,
# and one that forgets 1.5 to 1.7 nats with every token, 400 in 256 of them.
GATES = {"trained": ((1e-3, 0.1), (1.0, 16.0)), "strong": ((0.095, 0.105), (16.0, 16.0))}
CHUNK = 128
STEP_OUTPUTS = ("o", "state")
SECONDS = 0.6  # of the clocks, a row
# Further from float64 than this is another function: bf16 products inside leave 2e-3 to 5e-3.
MAX_ERROR = 5e-2
MAX_EXACT_BYTES = 44e9  # as exact_bytes counts
CUT = 4096  # tokens: 16 chunks of 256, so that the compared tokens take the libraries to the kernels of the timed ones


def draw(case: ScanCase, gates: str, device: str = "cuda") -> ScanInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def between(least: float, greatest: float, *shape: int) -> Tensor:
        return least + (greatest - least) * torch.rand(shape, generator=generator, device=device)

    def raw_step(*shape: int) -> Tensor:
        """What softplus makes a step of; log(exp(s) - 1) loses nothing for the small ones in this form."""
        return torch.special.expm1(between(math.log(least), math.log(greatest), *shape).exp()).log()

    (least, greatest), decays = GATES[gates]
    of_heads = {"x": (case.HX, case.V), "b": (case.GB, case.K), "c": (case.G, case.K)}
    mixed = {  # as a convolution with silu leaves them
        name: F.silu(normal(case.B, case.T, *dims)).to(case.dtype) for name, dims in of_heads.items()
    }
    dt_bias = raw_step(case.H).to(case.dtype).float()
    state, state_shape = None, (case.B, case.H, case.V, case.K)
    if case.initial_state or "decode" in case.passes:
        state = normal(*state_shape).to(case.state_dtype)
    return ScanInputs(
        **mixed,
        dt=(raw_step(case.B, case.T, case.H) - dt_bias).to(case.dtype),
        a=-between(*decays, case.H),
        d=torch.ones(case.H, device=device),
        dt_bias=dt_bias,
        initial_state=state,
        output_gradients=(normal(case.B, case.T, case.H, case.V).to(case.dtype), normal(*state_shape)),
    )


def work(case: ScanCase, pass_: str) -> Work:
    """The counts of the agreed cost model ("Mamba-2 SSD ...", section 4), x and b un-repeated, and each state once.

    A multiply and an add are 2 FLOP; chunks of 128, of which the causal half counts. Of a token, with N = K and P = V:
        forward    C (G N + H P) + 4 H N P        C B^T; its product with x; state out and in
        backward   C (3 G N + 2 H P) + 10 H N P   the least that the gradients and the recomputed states need
        decode     5 H N P                        decay, write, read
    Bytes of a token, every input read and every output written once: x, b, c, dt, o in the inputs' dtype; in the
    backward x, b, c, dt and the gradient of o again, and their gradients.
    """
    K, V, C, size = case.K, case.V, CHUNK, case.dtype.itemsize
    tokens, inner = case.B * case.T, case.H * V
    read = case.HX * V + (case.GB + case.G) * K + case.H  # numbers of a token
    state = case.B * case.H * V * K
    if pass_ == "decode":
        moved = tokens * size * (read + inner) + 2 * state * case.state_dtype.itemsize
        return Work(bytes=moved, flop=5 * state)
    product = case.H * K * V
    moved = tokens * size * (read + inner) + 4 * state * (2 if case.initial_state else 1)
    flop = tokens * (C * (case.G * K + inner) + 4 * product)
    if pass_ == "forward_backward":
        moved += tokens * size * (2 * read + inner)
        moved += 4 * state * (3 if case.initial_state else 1)  # gradient in; read again and its gradient out
        flop += tokens * (C * (3 * case.G * K + 2 * inner) + 10 * product)
    return Work(bytes=moved, flop=flop)


def exact_bytes(case: ScanCase) -> float:
    """Peak of the float64 reference with its gradients, fitted to counted allocations within 2 %."""
    doubles = 160 + 4 * case.K + 9.5 * case.V + 4 * case.K * case.V / 64  # of a token and a head; chunks of 64
    return 8.0 * case.B * case.T * case.H * doubles


def checked_tokens(case: ScanCase) -> int:
    """All tokens of a sequence, or as many times CUT as the float64 reference has memory for."""
    share = _exact_room() / exact_bytes(case)
    return case.T if share >= 1 else max(int(share * case.T) // CUT, 1) * CUT


def _exact_room() -> float:
    """Half of what the GPU has free at most: the inputs of 1M tokens take much of one."""
    if not torch.cuda.is_available():
        return MAX_EXACT_BYTES
    torch.cuda.empty_cache()  # of what drawing them took besides
    free, _ = torch.cuda.mem_get_info()
    return min(MAX_EXACT_BYTES, free / 2)


def our_scan(backend: str, inputs: ScanInputs) -> Run:
    x = inputs

    def forward() -> Tensors:
        options: dict[str, Any] = {"d": x.d, "dt_bias": x.dt_bias, "dt_softplus": True}
        return hylo_ops.chunk_ssd(x.x, x.dt, x.a, x.b, x.c, **options, initial_state=x.initial_state, backend=backend)

    return forms.plain_run(inputs, forward, OUTPUTS)


def our_step(backend: str, inputs: ScanInputs) -> Step:
    x, state = inputs, inputs.initial_state
    assert state is not None

    def forward() -> Tensors:
        options: dict[str, Any] = {"d": x.d, "dt_bias": x.dt_bias, "dt_softplus": True}
        return hylo_ops.recurrent_ssd(x.x, x.dt, x.a, x.b, x.c, state, **options, backend=backend), state

    return Step(forward)


FUNCTIONS = forms.Functions(our_scan, our_step, peers.FORMS, peers.STEPS, step_names=STEP_OUTPUTS, limit=MAX_ERROR)


def first_call(case: ScanCase, backend: str, device: str) -> Callable[[], Callable[[], object]]:
    """Draws inputs; what is returned runs the forward on them and returns what runs the backward."""
    return our_scan(backend, draw(case, "trained", device).leaves()).begin


def run(case: ScanCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """Rows for every gate set and pass of the case; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    for gates in case.gates:
        inputs = draw(case, gates)
        checked = inputs.first(checked_tokens(case))
        exact = FUNCTIONS.exact(case.passes, checked)
        for pass_ in case.passes:
            ours, others = FUNCTIONS.prepare(case.name, pass_, backends, chosen_peers, inputs, checked, exact[pass_])
            common = {
                "case": case.name,
                "shape": case.shape,
                "dtype": DTYPE_NAMES[case.dtype],
                "state_dtype": DTYPE_NAMES[case.state_dtype],
                "gates": gates,
                "pass": pass_,
                "initial_state": inputs.initial_state is not None,
                "checked_T": checked.dt.shape[1],
            }
            host = pass_ == "decode" and case.B == 1  # where the host decides: longer calls hide it
            yield from contest.rows(common, ours, others, work(case, pass_), roofs, seconds=SECONDS, host=host)
