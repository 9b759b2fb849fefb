"""Choosing the next token in other libraries: each a call that gives the tokens [B] of one step."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.peers import Missing, imported
from hylo.inference.sampling import Sampling

Choice = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class LogitsInputs:
    """What every contestant gets."""

    logits: Tensor  # [B, V]
    sampling: Sampling

    @property
    def cuts(self) -> dict[str, float]:
        both = {"top_k": self.sampling.top_k, "top_p": self.sampling.top_p}
        return {name: value for name, value in both.items() if value is not None}


Form = Callable[[LogitsInputs], Choice]

_WARPERS = "transformers.generation.logits_process"


def _transformers(inputs: LogitsInputs) -> Choice:
    """As its generate() does it, which widens the logits first."""
    logits, how = inputs.logits, inputs.sampling
    warpers = []
    if how.temperature > 0:
        warpers.append(imported(_WARPERS, "TemperatureLogitsWarper")(how.temperature))
    if how.top_k is not None:
        warpers.append(imported(_WARPERS, "TopKLogitsWarper")(how.top_k))
    if how.top_p is not None:
        warpers.append(imported(_WARPERS, "TopPLogitsWarper")(how.top_p))
    tokens = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)  # none of the warpers reads them

    def call() -> Tensor:
        scores = logits.to(torch.float32, copy=True)
        for warper in warpers:
            scores = warper(tokens, scores)
        if how.temperature == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]

    return call


_OFFSETS = 8192  # calls before random numbers come again: more than a check makes
_NUMBERS = 1024  # of a row, between one call's offset and the next: more than a call takes


def _random_numbers(device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """FlashInfer's seed and the offset of a call, on the device: it cannot ask a generator in a graph.

    Each call has an offset of its own, made outside the clock, since what is rejected is drawn again.
    """
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    offsets = itertools.cycle((_NUMBERS * torch.arange(_OFFSETS, device=device)).split(1))
    return lambda: {"seed": seed, "offset": next(offsets)}


def _flashinfer_probs(inputs: LogitsInputs) -> Choice:
    """Its softmax, and its draws from probabilities."""
    logits, temperature, cuts = inputs.logits, inputs.sampling.temperature, inputs.cuts
    if temperature == 0:
        raise Missing("the likeliest is chosen from logits: flashinfer_logits")
    softmax = imported("flashinfer.sampling", "softmax")
    draw = partial(imported("flashinfer.sampling", "_".join([*cuts, "sampling_from_probs"])), **cuts)
    numbers = _random_numbers(logits.device)
    return lambda: draw(softmax(logits, temperature=temperature), **numbers())


def _flashinfer_logits(inputs: LogitsInputs) -> Choice:
    """Its draws from logits, which take no temperature; from the likeliest alone, where there is a top_k."""
    logits, how = inputs.logits, inputs.sampling
    if how.temperature == 0:
        top_k = imported("flashinfer.topk", "top_k")
        return lambda: top_k(logits, 1)[1][:, 0]
    if how.top_k is not None:
        draw = imported("flashinfer.sampling", "top_k_top_p_sampling_from_logits")
        draw = partial(draw, top_k=how.top_k, top_p=1.0 if how.top_p is None else how.top_p)
    elif how.top_p is None:
        draw = imported("flashinfer.sampling", "sampling_from_logits")
    else:
        raise Missing("top_p alone cuts probabilities: flashinfer_probs")
    # Of one dimension, so that the quotient is fp32: widened in the same kernel.
    temperature = torch.tensor([how.temperature], dtype=torch.float32, device=logits.device)
    numbers = _random_numbers(logits.device)
    return lambda: draw(logits / temperature, **numbers())


FORMS: dict[str, Form] = {
    "transformers": _transformers,
    "flashinfer_probs": _flashinfer_probs,
    "flashinfer_logits": _flashinfer_logits,
}
