"""Counters of pieces that have arrived: zero between launches, as whoever needs them last in a launch leaves them so.

A launch owns its counters while it runs. Launches of one stream run one after the other and share theirs; a captured
one may be replayed on any stream, so it gets counters that nothing else has.
"""

import torch
from torch import Tensor

_LEAST = 4096
_BLOCK = 1 << 20  # counters of a block that captured launches take theirs from: 4 MiB

_of_stream: dict[tuple[int, int], tuple[Tensor, int]] = {}
_for_graphs: dict[int, tuple[Tensor, int]] = {}  # a block, and how many of it are taken
_full: list[Tensor] = []  # blocks that graphs point into, for as long as the process lives


def tickets(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros for a launch on the current stream of a CUDA device; fresh ones on others."""
    index = device.index
    if index is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _taken_for_good(count, device)
    _refill(device)
    key = (index, torch._C._cuda_getCurrentRawStream(index))
    found, size = _of_stream.get(key, (None, 0))
    if found is None or size < count:
        size = max(count, _LEAST)
        found = torch.zeros(size, dtype=torch.int32, device=device)
        _of_stream[key] = found, size
    return found


def _taken_for_good(count: int, device: torch.device) -> Tensor:
    block, taken = _for_graphs.get(device.index, (None, _BLOCK))
    if block is None or taken + count > _BLOCK:
        # Allocated and set to zero inside the graph: right, at the price of one launch more in each replay.
        return torch.zeros(count, dtype=torch.int32, device=device)
    _for_graphs[device.index] = block, taken + count
    return block[taken : taken + count]


def _refill(device: torch.device) -> None:
    """By a call that is not captured: what a capture allocates belongs to its graph."""
    block, taken = _for_graphs.get(device.index, (None, _BLOCK))
    if taken > _BLOCK // 2:
        if block is not None:
            _full.append(block)
        _for_graphs[device.index] = torch.zeros(_BLOCK, dtype=torch.int32, device=device), 0
