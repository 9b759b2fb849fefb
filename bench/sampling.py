"""Choosing the next token out of logits. `python -m bench sampling`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hylo_ops
from bench import contest
from bench.contest import Contestant, Results, Roofs, Work
from bench.peers import sampling as peers
from bench.peers.sampling import Choice, Form, LogitsInputs
from bench.shapes import SAMPLING, SamplingCase
from hylo.inference.sampling import Sampling

CASES = {case.name: case for case in SAMPLING}
PEERS = list(peers.FORMS)
SECONDS = 1.0
LOGIT = 3.0  # standard deviation

# The check compares how often classes are drawn with their exact probabilities, in bins of about equal mass: single
# classes are drawn too seldom. A right result's relative error squared is about chi-squared of BINS - 1 over DRAWS,
# above MAX_ERROR squared once in a million times. A single draw of what has no probability is an infinite error.
BINS, DRAWS, MAX_ERROR = 8, 4096, 0.1
# So many classes of the check's logits have values of their own, from LIKELIEST down in the steps of bf16. All others
# are below them: what is cut is never one of equals, of which libraries keep one, or all.
APART, LIKELIEST, STEP = 80, 13.0, 1 / 16


def draw(case: SamplingCase, device: str = "cuda") -> LogitsInputs:
    """What the clocks run on: every sequence has logits of its own."""
    generator = torch.Generator(device=device).manual_seed(0)
    logits = LOGIT * torch.randn(case.B, case.V, generator=generator, device=device)
    return LogitsInputs(logits=logits.to(case.dtype), sampling=Sampling(case.temperature, case.top_k, case.top_p))


def check_logits(case: SamplingCase) -> Tensor:
    """[V] on the CPU, in no order."""
    generator = torch.Generator().manual_seed(0)
    apart = LIKELIEST - STEP * torch.arange(APART)
    others = LOGIT * torch.randn(case.V - APART, generator=generator)
    logits = torch.cat([apart, others.clamp(max=LIKELIEST - STEP * APART)])
    return logits[torch.randperm(case.V, generator=generator)].to(case.dtype)


def exact_probabilities(logits: Tensor, case: SamplingCase) -> Tensor:
    """Of the classes of one sequence, float64, 0 where they are cut."""
    likeliest_first, order = logits.double().sort(descending=True)
    kept = 1 if case.temperature == 0 else case.top_k or case.V
    probabilities = (likeliest_first[:kept] / (case.temperature or 1.0)).softmax(-1)
    if case.top_p is not None:
        probabilities = probabilities[: int((probabilities.cumsum(-1) < case.top_p).sum()) + 1]
    exact = torch.zeros(case.V, dtype=torch.float64)
    exact[order[: len(probabilities)]] = probabilities / probabilities.sum()
    return exact


def bins_of(probabilities: Tensor) -> Tensor:
    """[V] int64: the bin of each class, the likeliest first; BINS for what is never drawn."""
    likeliest_first, order = probabilities.sort(descending=True)
    middle = likeliest_first.cumsum(-1) - likeliest_first / 2
    bins = (BINS * middle).long().clamp(max=BINS - 1)
    return torch.empty_like(bins).scatter_(0, order, bins.where(likeliest_first > 0, BINS))


def shares(tokens: Tensor, bins: Tensor) -> Results:
    """Of the draws, by bin, and of those that should not be."""
    counts = bins[tokens.long().cpu()].bincount(minlength=BINS + 1)
    return _named(counts.double() / len(tokens))


def exact_shares(probabilities: Tensor, bins: Tensor) -> Results:
    return _named(bins.bincount(probabilities, minlength=BINS + 1))


def _named(by_bin: Tensor) -> Results:
    return {"shares": by_bin[:BINS], "outside": by_bin[BINS:]}


def work(case: SamplingCase) -> Work:
    """Logits read and int64 tokens written once.

    FLOP of a class: the comparison alone, or with it temperature, exponential and sum of a softmax.
    """
    classes = case.B * case.V
    flop = classes * (1 if case.temperature == 0 else 4)
    return Work(bytes=classes * case.dtype.itemsize + case.B * torch.int64.itemsize, flop=flop)


def _ours(backend: str, inputs: LogitsInputs) -> Choice:
    """As the engine calls it, but with PyTorch's own generator, which every graph that is captured knows."""
    return partial(hylo_ops.sample_tokens, inputs.logits, **asdict(inputs.sampling), backend=backend)


BACKENDS = ["triton", "reference"]
OURS: dict[str, Form] = {name: partial(_ours, name) for name in BACKENDS}


def contestant(form: Form, inputs: LogitsInputs, checked: LogitsInputs, bins: Tensor) -> Contestant:
    def check() -> Results:
        torch.manual_seed(0)  # a result that was right is right again
        call = form(checked)
        return shares(torch.cat([call() for _ in range(-(-DRAWS // len(checked.logits)))]), bins)

    return Contestant(check=check, start=partial(form, inputs))


def run(case: SamplingCase, backends: list[str], chosen_peers: list[str], roofs: Roofs) -> Iterator[dict[str, Any]]:
    """One row for each backend; correctness first, then the clocks.

    Raises:
        AssertionError: a backend of ours draws from another distribution.
    """
    inputs, logits = draw(case), check_logits(case)
    checked = replace(inputs, logits=logits.to(inputs.logits.device).repeat(case.B, 1))
    probabilities = exact_probabilities(logits, case)
    bins = bins_of(probabilities)

    def contestants(forms: Mapping[str, Form], names: list[str]) -> dict[str, Contestant]:
        return {name: contestant(forms[name], inputs, checked, bins) for name in names}

    mine, theirs = contestants(OURS, backends), contestants(peers.FORMS, chosen_peers)
    sides = contest.prepare(case.name, mine, theirs, exact_shares(probabilities, bins), MAX_ERROR)
    common = {**contest.described(case, "decode"), "sampling": asdict(inputs.sampling)}
    yield from contest.rows(common, *sides, work(case), roofs, seconds=SECONDS, host=case.B == 1)
