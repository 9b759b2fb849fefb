"""Distributions that sample_tokens is held to, on every device and backend."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """How of V classes, in a type whose numbers are so far apart that many are equal, or not, one is drawn."""

    V: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    dtype: torch.dtype = torch.bfloat16
    equal: int = 0  # classes that share one logit, near the likeliest

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"V{self.V}-T{self.temperature}-k{self.top_k}-p{self.top_p}-{dtype}-equal{self.equal}"

    @property
    def options(self) -> dict[str, float | int | None]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def logits(self) -> Tensor:
        """[V] on the CPU: both signs, both zeros, and one class that is out of the question."""
        logits = 2 * torch.randn(self.V, generator=torch.Generator().manual_seed(self.V))
        logits[: self.equal] = logits.max() - 0.5
        if self.V > 8:
            logits[-3:] = torch.tensor([0.0, -0.0, -torch.inf])
        return logits.to(self.dtype)


CUTS = ((0.7, None, None), (0.7, 5, None), (1.3, None, 0.9), (0.7, 30, 0.8), (0.7, None, 0.05), (2.0, 20, 0.3))
CASES = [
    *(Case(V, *cuts) for V in (50, 700) for cuts in CUTS),
    *(Case(64, *cuts, equal=20) for cuts in CUTS),
    *(Case(300, *cuts, dtype=dtype) for cuts in CUTS[1:4] for dtype in (torch.float16, torch.float32)),
    Case(300, 0.7, 100, 0.8),  # more than a program of few lanes holds
    Case(1),
    Case(7, top_k=7, top_p=1.0),
    Case(7, top_k=100),
    Case(50, top_k=1),
]


def probabilities(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The classes, the likeliest first, and the probability of each, float64."""
    likeliest, order = logits.double().sort(descending=True)
    kept = min(case.top_k or case.V, case.V)
    weights = (likeliest / case.temperature).softmax(-1)
    weights[kept:] = 0
    weights /= weights.sum()
    if case.top_p is not None:
        weights[weights.cumsum(-1) - weights >= case.top_p - 1e-6] = 0
    return order, weights / weights.sum()


def check(tokens: Tensor, logits: Tensor, case: Case) -> None:
    """Frequencies of values, whose equals share what is left of them, within 5 standard deviations; nothing else."""
    order, weights = probabilities(logits, case)
    values, group = logits.double().unique(return_inverse=True)
    expected = torch.zeros(len(values), dtype=torch.float64).scatter_add_(0, group[order], weights)
    drawn = torch.bincount(group[tokens], minlength=len(values)).double() / len(tokens)
    assert not drawn[expected == 0].any(), "something that is cut was drawn"
    # of rare ones together, as their counts are no normal numbers
    rare = expected * len(tokens) < 10
    pairs = [(drawn[~rare], expected[~rare]), (drawn[rare].sum()[None], expected[rare].sum()[None])]
    for found, right in pairs:
        apart = (found - right).abs()
        assert (apart <= 5 * (right * (1 - right) / len(tokens)).clamp(min=1e-7).sqrt() + 1e-3).all(), apart.max()
