"""Memory of code that runs as shapes: no tensor has memory behind it, but all are counted as if they had."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import masking_utils


class CountBytes(TorchDispatchMode):
    """Bytes of every tensor that operators return, from its first sight to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._now = self._most = 0

    def take(self) -> int:
        """The most at one time since the last call."""
        most, self._most = self._most, self._now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self._now += storage.nbytes()
            self._most = max(self._most, self._now)
            weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self._now -= self._sizes.pop(address)


@contextlib.contextmanager
def counted_shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountBytes]:
    """Run what follows as shapes on the CPU; an operator of `hylo_ops` is its results alone."""
    # Shapes have no values to look at, and where it cannot look transformers makes a mask of T x T.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: False)
    with FakeTensorMode(allow_non_fake_inputs=True), CountBytes() as counted:
        yield counted
