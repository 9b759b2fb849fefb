"""A Mamba2 block between its projections: convolution, scan and gated norm together, and its decode step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, forms, ssd
from bench.contest import Roofs, Work
from bench.forms import Run, Step, Tensors
from bench.peers import mamba2 as peers
from bench.peers.causal_conv1d import newest
from bench.peers.mamba2 import OUTPUTS, MixerInputs
from bench.shapes import MAMBA2, MixerCase, ScanCase
from hylo_ops.testing import DTYPE_NAMES

CASES = {case.name: case for case in MAMBA2}
PEERS = [*peers.FORMS, *(name for name in peers.STEPS if name not in peers.FORMS)]
# "auto" is what each op takes by itself, with backend=None.
BACKENDS = ["auto", "cuda", "triton", "composed"]
OF_PASS = {"forward": ["auto", "triton"], "forward_backward": ["auto", "triton"], "decode": ["cuda", "composed"]}
STEP_OUTPUTS = ("y", "conv_state", "state")
EPS = 1e-5
SECONDS = 0.6  # of the clocks, a row
MAX_ERROR = 5e-2  # further from float64 than this is another function


def draw(case: MixerCase, device: str = "cuda") -> MixerInputs:
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    scan = ssd.draw(scan_case(case), "trained", device=device)
    inner = case.H * case.V
    projected = normal(case.B, case.T, inner + case.channels + case.H)
    z, xbc, dt = projected.split([inner, case.channels, case.H], dim=-1)
    dt.copy_(scan.dt)
    decode = "decode" in case.passes
    return MixerInputs(
        z=z.unflatten(-1, (case.H, case.V)),
        xbc=xbc,
        dt=dt,
        conv_weight=normal(case.channels, case.W) * case.W**-0.5,
        conv_bias=normal(case.channels) * case.W**-0.5,
        a=scan.a,
        norm_weight=1 + 0.1 * normal(case.NG, inner // case.NG),
        d=scan.d,
        dt_bias=scan.dt_bias,
        conv_state=normal(case.B, case.channels, case.W) if decode else None,
        state=scan.initial_state,
        d_state=case.K,
        x_heads=case.HX,
        b_heads=case.GB,
        eps=EPS,
        output_gradients=scan.output_gradients,
    )


def scan_case(case: MixerCase) -> ScanCase:
    """The scan inside, without what is around it."""
    dims = case.G, case.H, case.K, case.V, case.HX, case.GB
    return ScanCase(case.name, case.B, case.T, *dims, case.state_dtype, dtype=case.dtype)


def work(case: MixerCase, pass_: str) -> Work:
    """Bytes: what enters and leaves the block once (z, xbc, dt, y, states, parameters), in the backward z, xbc, dt and
    the gradient of y again and their gradients; nothing that lies between its parts. FLOP: those of its parts, as their
    own benchmarks count them.
    """
    size, tokens = case.dtype.itemsize, case.B * case.T
    inner, width = case.H * case.V, case.H * case.V + case.channels + case.H
    state = case.B * case.H * case.V * case.K * case.state_dtype.itemsize
    parameters = size * (case.channels * (case.W + 1) + inner)
    moved = tokens * size * (width + inner) + parameters
    per_channel, per_element = 2 * case.W + 5, 9
    if pass_ == "decode":
        moved += 2 * state + 2 * case.B * case.channels * case.W * size
    else:
        moved += state
    if pass_ == "forward_backward":
        moved += tokens * size * (2 * width + inner) + state + 2 * parameters
        per_channel, per_element = 2 * per_channel + 4 * case.W + 5, per_element + 25
    around = tokens * (case.channels * per_channel + inner * per_element)
    return Work(bytes=moved, flop=ssd.work(scan_case(case), pass_).flop + around)


def our_scan(backend: str, inputs: MixerInputs) -> Run:
    i = inputs

    def forward() -> Tensors:
        y, _, final_state = hylo_ops.fused.mamba2_scan(
            *(i.z, i.xbc, i.dt, i.conv_weight, i.conv_bias, i.a, i.norm_weight),
            d_state=i.d_state,
            x_heads=i.x_heads,
            b_heads=i.b_heads,
            d=i.d,
            dt_bias=i.dt_bias,
            eps=i.eps,
            backend=None if backend == "auto" else backend,
        )
        return y, final_state

    return forms.plain_run(inputs, forward, OUTPUTS)


def our_step(backend: str, inputs: MixerInputs) -> Step:
    i, conv_state, state = inputs, inputs.conv_state, inputs.state
    assert conv_state is not None
    assert state is not None

    def forward() -> Tensors:
        y = hylo_ops.fused.mamba2_step(
            *(i.z, i.xbc, i.dt, i.conv_weight, i.conv_bias, i.a, i.norm_weight, conv_state, state),
            d_state=i.d_state,
            x_heads=i.x_heads,
            b_heads=i.b_heads,
            d=i.d,
            dt_bias=i.dt_bias,
            eps=i.eps,
            backend=backend,
        )
        return y, conv_state, state

    return Step(forward, lambda found: (found[0], newest(found[1]), found[2]))


FUNCTIONS = forms.Functions(our_scan, our_step, peers.FORMS, peers.STEPS, step_names=STEP_OUTPUTS, limit=MAX_ERROR)


def run(case: MixerCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """A row for every pass of the case; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    inputs = draw(case)
    exact = FUNCTIONS.exact(case.passes, inputs)
    for pass_ in case.passes:
        able = [name for name in backends if name in OF_PASS[pass_]]
        ours, others = FUNCTIONS.prepare(case.name, pass_, able, chosen_peers, inputs, inputs, exact[pass_])
        common = {
            "case": case.name,
            "shape": case.shape,
            "dtype": DTYPE_NAMES[case.dtype],
            "state_dtype": DTYPE_NAMES[case.state_dtype],
            "gates": "trained",
            "pass": pass_,
        }
        host = pass_ == "decode" and case.B == 1
        yield from contest.rows(common, ours, others, work(case, pass_), roofs, seconds=SECONDS, host=host)
