"""Sequences that `seq_idx` marks, as our ops take them: one packed row with bounds."""

import torch
from torch import Tensor

from hylo_ops import checks


def bounds_of(seq_idx: Tensor, batch: int, tokens: int) -> Tensor:
    """`cu_seqlens` [N + 1] int32 of the rows of `seq_idx` [B, T], one after the other.

    A sequence is a run of equal numbers within a row. How many there are is known on the device only, so this waits
    for it: one synchronisation.
    """
    checks.shape("seq_idx", seq_idx, batch, tokens)
    first = torch.ones_like(seq_idx, dtype=torch.bool)
    first[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([batch * tokens])]).int()


def packed(x: Tensor) -> Tensor:
    """[B, T, ...] -> [1, B * T, ...]."""
    return x.flatten(0, 1)[None]


def first_of_rows(bounds: Tensor, batch: int, tokens: int) -> Tensor:
    """[B]: the number of the sequence that holds each row's first token."""
    rows = tokens * torch.arange(batch, dtype=bounds.dtype, device=bounds.device)
    return torch.searchsorted(bounds, rows, right=True) - 1


def last_of_rows(bounds: Tensor, batch: int, tokens: int) -> Tensor:
    """[B]: the number of the sequence that holds each row's last token."""
    ends = tokens * torch.arange(1, batch + 1, dtype=bounds.dtype, device=bounds.device)
    return torch.searchsorted(bounds, ends) - 1


def first_states(initial: Tensor | None, bounds: Tensor, batch: int, tokens: int) -> Tensor | None:
    """[N, ...]: each row's initial state where its first sequence starts, zeros where another does."""
    if initial is None:
        return None
    zeros = initial.new_zeros(bounds.shape[0] - 1, *initial.shape[1:])
    return zeros.index_copy(0, first_of_rows(bounds, batch, tokens), initial)
