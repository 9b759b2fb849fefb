"""The next token out of logits, on their device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hylo.errors import UserError
from hylo.mixers.recurrent import widened


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
        top_k: only of the so many likeliest; of all if None.
        top_p: only of the likeliest that together reach this probability, after `top_k`; of all if None.
    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be a number from 0 on, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise UserError(f"top_k and top_p need a temperature above 0, got {self.temperature}")


GREEDY = Sampling()

_PARTS = 128


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [B, vocabulary] -> tokens [B] int64. No synchronisation; a CUDA graph can capture it."""
    if sampling.temperature == 0:
        return _likeliest(logits)
    candidates, tokens = logits, None  # sorted in their own dtype: half as many bits as of scores
    if sampling.top_k is not None:
        candidates, tokens = logits.topk(min(sampling.top_k, logits.shape[1]))
    elif sampling.top_p is not None:
        candidates, tokens = logits.sort(descending=True)
    scores = widened(candidates) / sampling.temperature
    if sampling.top_p is not None:
        weights = scores.softmax(-1)
        likelier = weights.cumsum(-1) - weights
        scores = scores.masked_fill(likelier >= sampling.top_p, -math.inf)
    drawn = _drawn(scores, generator)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]


def _drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Of clocks that ring after exponential times at rates exp(scores), the first is a draw of softmax(scores).

    That is the largest of score - log(time): no sum, no search.
    """
    times = torch.empty_like(scores).exponential_(generator=generator).clamp_(min=torch.finfo(scores.dtype).tiny)
    return _likeliest(scores - times.log_())


def _likeliest(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)`, of parts of the vocabulary first: PyTorch gives each row of what it reduces to one block."""
    parts = math.gcd(logits.shape[-1], _PARTS)
    most, places = logits.unflatten(-1, (parts, -1)).max(-1)
    part = most.argmax(-1, keepdim=True)
    return (part * (logits.shape[-1] // parts) + places.gather(-1, part))[:, 0]
