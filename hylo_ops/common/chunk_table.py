"""Where the chunks of a batch lie, when sequences of different lengths are packed into one row of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTable:
    """Chunks in slots; a chunk never crosses a sequence, an empty sequence has none.

    Tokens count through the whole batch: token t of row b is b * T + t. Without packing every row has as many chunks,
    kernels find them by arithmetic, and the tensors are None. `hylo_ops.common.triton_math` reads the table.

    Args:
        length: T, tokens of a row.
        sequences: N.
        slots: number of slots; with packing an upper bound, so that the host needs no length.
        bounds: [N + 1] int64. First token of each sequence, and the end.
        first_chunk: [N + 1] int32. Slot of each sequence's first chunk, and the number of chunks.
        sequence: [slots] int32. -1: unused.
        begin: [slots] int64. First token of the chunk; undefined where unused, as is `end`.
        end: [slots] int64. End of the chunk's sequence.
    """

    length: int
    sequences: int
    slots: int
    bounds: Tensor | None = None
    first_chunk: Tensor | None = None
    sequence: Tensor | None = None
    begin: Tensor | None = None
    end: Tensor | None = None


def chunk_table(batch: int, length: int, cu_seqlens: Tensor | None, chunk: int) -> ChunkTable:
    """The chunks of `batch` rows of `length` tokens, or of the sequences packed into one row; never synchronises."""
    if cu_seqlens is None:
        return ChunkTable(length, batch, batch * -(-length // chunk))
    sequences = cu_seqlens.shape[0] - 1
    slots = length // chunk + sequences
    bounds = cu_seqlens.to(torch.int64)
    chunks = (bounds.diff() + chunk - 1).div(chunk, rounding_mode="floor")
    first_chunk = torch.cat([bounds[:1] * 0, chunks.cumsum(0)])
    slot = torch.arange(slots, device=cu_seqlens.device)
    # Of equal entries (empty sequences) the last one owns the slot.
    found = torch.searchsorted(first_chunk, slot, right=True) - 1
    unused = found == sequences
    owner = found.clamp(max=sequences - 1)
    return ChunkTable(
        length,
        sequences,
        slots,
        bounds=bounds,
        first_chunk=first_chunk.to(torch.int32),
        sequence=found.masked_fill(unused, -1).to(torch.int32),
        begin=bounds[owner] + (slot - first_chunk[owner]) * chunk,
        end=bounds[owner + 1],
    )
