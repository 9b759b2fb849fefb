"""Caches of fixed size: the rows of all MLA layers in one tensor, the states of all recurrent layers in others."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hylo.mixers import GatedDeltaNet, Mamba2, MultiHeadLatentAttention
from hylo.mixers.mla import LatentState
from hylo.mixers.recurrent import LayerState


@dataclass
class Cursor:
    """Where in the pools the layers work: on tokens of one sequence, or on one more token of each of the first.

    Args:
        position: [B] int32, where each sequence's next token goes; lengths: [B] int32, tokens with that one.
    """

    position: Tensor
    lengths: Tensor
    sequences: slice = field(default_factory=lambda: slice(0, 0))
    begin: int = 0
    decoding: bool = False

    def read(self, sequence: int, begin: int) -> None:
        """What follows are tokens of one sequence, from position `begin` on."""
        self.sequences, self.begin, self.decoding = slice(sequence, sequence + 1), begin, False

    def decode(self, count: int) -> None:
        """What follows is a token of each of the first `count` sequences."""
        self.sequences, self.decoding = slice(0, count), True


class PooledRows(LatentState):
    """The rows [B, capacity, row] of one MLA layer. They lie per sequence from 0 on: there is no padding."""

    def __init__(self, rows: Tensor, cursor: Cursor) -> None:
        self._rows, self._cursor = rows, cursor
        self.preallocated = True

    def append(self, rows: Tensor) -> Tensor:
        ours = self._rows[self._cursor.sequences]
        ours[:, self._cursor.begin : self._cursor.begin + rows.shape[1]] = rows
        return ours

    def open_row(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        cursor = self._cursor
        return self._rows[cursor.sequences], cursor.position[cursor.sequences], cursor.lengths[cursor.sequences]


class PooledState(LayerState):
    """Convolution [B, D, W] and recurrent state [B, H, ., .] of one layer. Zeros are the state before any token."""

    def __init__(self, conv: Tensor, recurrent: Tensor, cursor: Cursor) -> None:
        self._conv, self._recurrent, self._cursor = conv, recurrent, cursor
        self._constant: Tensor | None = None

    @property
    def decoding(self) -> bool:
        return self._cursor.decoding

    @property
    def conv(self) -> Tensor:
        return self._conv[self._cursor.sequences]

    @property
    def recurrent(self) -> Tensor:
        return self._recurrent[self._cursor.sequences]

    def keep_conv(self, final: Tensor) -> None:
        self.conv.copy_(final)

    def keep_recurrent(self, final: Tensor) -> None:
        self.recurrent.copy_(final)

    def constant(self, make: Callable[[], Tensor]) -> Tensor:
        if self._constant is None:
            self._constant = make()
        return self._constant


class Pools:
    """Caches of all layers for B sequences of up to `capacity` tokens.

    `rows` [MLA layers, B, capacity, row] is in the dtype of the weights, `recurrent` in fp32 (fp64 with fp64 weights),
    `conv` as the weights: it keeps inputs, which nothing is added to. The last two are flat; `layers` has the parts.
    """

    def __init__(self, mixers: list[nn.Module], batch: int, capacity: int, like: Tensor) -> None:
        device, wide = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
        position, lengths = torch.zeros(2, batch, dtype=torch.int32, device=device)
        self.cursor = Cursor(position, lengths)
        latent = [mixer for mixer in mixers if isinstance(mixer, MultiHeadLatentAttention)]
        shapes = [mixer.state_shapes() for mixer in mixers if isinstance(mixer, GatedDeltaNet | Mamba2)]
        row = latent[0].row if latent else 0
        self.rows = torch.empty(len(latent), batch, capacity, row, dtype=like.dtype, device=device)
        self.conv, convs = _flat([(batch, *conv) for conv, _ in shapes], like.dtype, device)
        self.recurrent, states = _flat([(batch, *state) for _, state in shapes], wide, device)
        rows, of_state = iter(self.rows), iter(zip(convs, states, strict=True))
        self.layers: list[LatentState | LayerState] = [
            PooledRows(next(rows), self.cursor)
            if isinstance(mixer, MultiHeadLatentAttention)
            else PooledState(*next(of_state), self.cursor)
            for mixer in mixers
        ]

    @property
    def row_bytes(self) -> int:
        return self.rows.nbytes

    @property
    def state_bytes(self) -> int:
        return self.conv.nbytes + self.recurrent.nbytes

    def clear(self) -> None:
        """No sequence has a token: rows need nothing, since none is read beyond a length."""
        self.conv.zero_()
        self.recurrent.zero_()


def _flat(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Zeros for all shapes in one tensor, and its parts in these shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    whole = torch.zeros(sum(sizes), dtype=dtype, device=device)
    return whole, [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
