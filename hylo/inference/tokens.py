"""The newest token of each sequence: on the device for the next step, and on its way to the host."""

from collections.abc import Callable

import torch
from torch import Tensor


class Tokens:
    """Two rows that take turns. So a row goes to the host while the next step, which reads it, writes the other one.

    A row may be written anew when what `send` gave for it has been called.

    Args:
        batch: how many sequences there may be.
        device: where steps run.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._rows = torch.zeros(2, batch, dtype=torch.long, device=device)
        self._mailbox = torch.zeros(2, batch, dtype=torch.long, pin_memory=on_gpu)
        self._courier = torch.cuda.Stream(device) if on_gpu else None
        if self._courier is not None:
            self._rows.record_stream(self._courier)

    def row(self, turn: int) -> Tensor:
        """[batch] int64; turns are counted from 0 on."""
        return self._rows[turn % 2]

    def send(self, turn: int, count: int) -> Callable[[], list[int]]:
        """Copies the first `count` tokens to the host, once they are there; what is returned waits for that alone."""
        row, place = self.row(turn)[:count], self._mailbox[turn % 2, :count]
        if self._courier is None:
            tokens = row.tolist()
            return lambda: tokens
        # A stream of its own: between two graphs of one stream, a copy keeps the second one waiting.
        self._courier.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._courier):
            place.copy_(row, non_blocking=True)
            sent = torch.cuda.Event()
            sent.record()

        def collect() -> list[int]:
            sent.synchronize()
            return place.tolist()

        return collect
