"""What the aligned initialisations of Gated DeltaNet and Mamba2 share: operating points of gates and decays."""

import torch
from torch import Tensor

from hylo.upcycle.calibrate import InputMoments

FASTEST, SLOWEST = 1.0, 0.02  # decay rates a token: from nearly the present token alone to fifty tokens
_SILU_IS_ONE = 1.27846454  # silu of this is 1
_RIDGE = 1e-4


def spread_rates(count: int) -> Tensor:
    """`count` decay rates a token in geometric steps, fastest first; a single one is their geometric mean."""
    if count == 1:
        return torch.tensor([(FASTEST * SLOWEST) ** 0.5])
    return torch.logspace(torch.tensor(FASTEST).log10(), torch.tensor(SLOWEST).log10(), count)


def before_softplus(x: Tensor) -> Tensor:
    """The y with softplus(y) = x."""
    return x + torch.log(-torch.expm1(-x))


def open_gate(moments: InputMoments) -> Tensor:
    """[D]: the row w for which silu(w @ x) stays nearest to 1 over the layer's inputs (least squares of w @ x).

    The gates have no bias; a random row would leave them near 0 and of random sign.
    """
    second = moments.second
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    return _SILU_IS_ONE * torch.linalg.solve(second + ridge, moments.mean)


def share_out(items: int, boxes: int) -> list[list[int]]:
    """Spread items 0..items-1 over boxes in order; with more boxes than items, an item is in several boxes."""
    starts = [box * items // boxes for box in range(boxes)]
    ends = [(box + 1) * items // boxes for box in range(boxes)]
    return [list(range(start, max(end, start + 1))) for start, end in zip(starts, ends, strict=True)]
