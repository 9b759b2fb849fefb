"""The next token out of logits, on their device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hylo.errors import UserError
from hylo_ops import sample_tokens


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


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits [B, vocabulary] -> tokens [B] int64. No synchronisation; a CUDA graph can capture it."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    return sample_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
