"""Expanded causal attention of an MLA layer in training: forward, and forward and backward together, by backend."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest, forms
from bench.contest import Roofs, Work
from bench.forms import Run, Tensors
from bench.peers import mla_attention as peers
from bench.peers.mla_attention import OUTPUTS, AttentionInputs
from bench.shapes import MLA_ATTENTION, MLA_ATTENTION_OTHER, AttentionCase

CASES = {case.name: case for case in MLA_ATTENTION}
EXTRA_CASES = {case.name: case for case in MLA_ATTENTION_OTHER}
PEERS = list(peers.FORMS)
BACKENDS = ["cudnn", "flash", "efficient"]
PASSES = ("forward", "forward_backward")
SECONDS = 0.6  # of the clocks, a row
MAX_ERROR = 5e-2  # further from float64 than this is another function
CHECKED_TOKENS = 2048  # float64 has all scores of all heads at once, a few times


def draw(case: AttentionCase, device: str = "cuda") -> AttentionInputs:
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(heads: int, width: int) -> Tensor:
        shape = case.B, case.T, heads, width
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    return AttentionInputs(
        q=normal(case.H, case.K),
        k=normal(case.HK, case.K),
        v=normal(case.HK, case.V),
        scale=case.K**-0.5,
        output_gradients=(normal(case.H, case.V),),
    )


def work(case: AttentionCase, pass_: str) -> Work:
    """Bytes: q, k, v and o once; in the backward all of them again, the gradient of o, and those of q, k and v.

    FLOP: of pairs of a query and a key that it sees two products, q k and p v; in the backward five: q k again, and one
    each for the gradients of p, v, q and k.
    """
    pairs = case.B * case.T * (case.T + 1) // 2
    inputs, output = case.H * case.K + case.HK * (case.K + case.V), case.H * case.V
    numbers, widths = inputs + output, case.K + case.V
    if pass_ == "forward_backward":
        numbers, widths = 3 * inputs + 3 * output, widths + 3 * case.K + 2 * case.V
    return Work(bytes=case.dtype.itemsize * case.B * case.T * numbers, flop=2 * case.H * pairs * widths)


def our_attention(backend: str, inputs: AttentionInputs) -> Run:
    i = inputs

    def forward() -> Tensors:
        return (hylo_ops.mla_attention(i.q, i.k, i.v, scale=i.scale, backend=backend),)

    return forms.plain_run(inputs, forward, OUTPUTS)


FUNCTIONS = forms.Functions(our_attention, None, peers.FORMS, {}, step_names=(), limit=MAX_ERROR)


def run(case: AttentionCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """A row for each pass and backend; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours computes something else than the float64 reference.
    """
    inputs = draw(case)
    checked = inputs.first(min(case.T, CHECKED_TOKENS))
    exact = FUNCTIONS.exact(PASSES, checked)
    for pass_ in PASSES:
        ours, others = FUNCTIONS.prepare(case.name, pass_, backends, chosen_peers, inputs, checked, exact[pass_])
        common = {**contest.described(case, pass_), "checked_T": checked.q.shape[1]}
        needed = work(case, pass_)
        for row in contest.rows(common, ours, others, needed, roofs, seconds=SECONDS, host=False):
            yield contest.with_all_rates(row, needed)
