"""What the references share: sequences packed into one row, working precision, rows of a state pool."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The references compute in float32, in float64 where an input has it."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def spans(cu_seqlens: Tensor, tokens: int) -> Iterator[tuple[int, slice]]:
    """(index, token range) of each packed sequence; reads `cu_seqlens` on the host."""
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of the input, got {bounds}")
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        yield n, slice(begin, end)


def for_each_sequence(
    one: Callable[[slice, Tensor | None], tuple[Tensor, Tensor]],
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    tokens: int,
) -> tuple[Tensor, Tensor]:
    """Runs `one(tokens, its initial state)` over all tokens, or over each packed sequence apart, and joins the results.

    Returns:
        Outputs joined along tokens (dim 1), final states stacked along dim 0.
    """
    if cu_seqlens is None:
        return one(slice(None), initial_state)
    parts = [
        one(span, None if initial_state is None else initial_state[n : n + 1]) for n, span in spans(cu_seqlens, tokens)
    ]
    return torch.cat([o for o, _ in parts], dim=1), torch.cat([s for _, s in parts])


def read_states(state: Tensor, state_indices: Tensor | None) -> Tensor:
    """The rows of a state pool in batch order; padding (-1) reads row 0 and is dropped again on writing."""
    return state if state_indices is None else state[state_indices.long().clamp(min=0)]


def write_states(state: Tensor, state_indices: Tensor | None, new: Tensor) -> None:
    if state_indices is None:
        state.copy_(new)
        return
    used = state_indices >= 0
    state[state_indices[used].long()] = new[used].to(state.dtype)


def zero_padding(output: Tensor, state_indices: Tensor | None) -> Tensor:
    """A padded row (state index -1) gives zeros."""
    if state_indices is None:
        return output
    return output.masked_fill((state_indices < 0).view(-1, *[1] * (output.ndim - 1)), 0)
