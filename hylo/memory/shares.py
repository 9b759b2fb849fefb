"""What one of several GPUs holds of a model that is cut up as hylo/distill/shards.py does it (FSDP2)."""

from __future__ import annotations

from hylo.memory.counts import Counts


def held(counts: Counts, size: int, gpus: int, *, root: bool, layers: int) -> int:
    """Bytes of a model's parameters.

    Args:
        size: bytes of a parameter.
        root: embedding and head are whole.
        layers: that are whole, or on their way to it, at one time.
    """
    whole = size * counts.total
    if gpus == 1:
        return whole
    return whole // gpus + size * (_table(counts) * root + layers * max(counts.layers))


def gradients(trainable: Counts, gpus: int, *, left: int, outside: int, before: int) -> int:
    """Elements of gradients in the backward of a layer of the pass that shares them out.

    Args:
        left: elements of gradients that earlier passes left, all of them whole; 0 without such passes.
        outside: elements of embedding and head that wait for the end of this pass.
        before: elements of the layers that this pass has been through.
    """
    layer = max(trainable.layers)
    whole = left - before if left else outside + layer
    return whole + before // gpus + layer  # what was sent of the layer before is given back one layer later


def last_gradients(trainable: Counts, gpus: int) -> int:
    """Elements when the pass ends: embedding and head whole, beside what is sent of them; a share of all layers."""
    return 2 * _table(trainable) + (trainable.total - _table(trainable)) // gpus


def _table(counts: Counts) -> int:
    """Embedding and head, the root's; the final norm is a unit of its own."""
    return counts.embedding + counts.head
