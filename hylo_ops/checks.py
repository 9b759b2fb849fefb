"""Shape, dtype and device checks with one message format: what was asked for, and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Each entry is a size that must match, or a letter that names a free dim."""
    shape = tensor.shape
    fits = len(shape) == len(expected)
    if fits:
        for want, got in zip(expected, shape, strict=True):  # no generator: decode steps call this often
            if want != got and not isinstance(want, str):
                fits = False
    if not fits:
        wanted = ", ".join(str(e) for e in expected)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(shape)}")


def dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ValueError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")


def same_device(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} ({first.device}), got {tensor.device}")


def multiple(name: str, value: int, of_name: str, of: int) -> None:
    if of <= 0 or value % of:
        raise ValueError(f"{name} must be a multiple of {of_name}, got {name} {value} and {of_name} {of}")


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def sequences(cu_seqlens: Tensor | None, batch: int) -> int:
    """The number of sequences N: the batch, or what `cu_seqlens` [N + 1] int32 packs into a batch of one."""
    if cu_seqlens is None:
        return batch
    shape("cu_seqlens", cu_seqlens, "N + 1")
    dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if batch != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1, got {batch}")
    return cu_seqlens.shape[0] - 1


def state_pool(state: Tensor, state_indices: Tensor | None, batch: int) -> None:
    """A state holds one row a sequence, or is a pool whose rows `state_indices` [B] picks (-1: padding)."""
    if state_indices is None:
        if state.shape[0] != batch:
            raise ValueError(f"state must have one row a sequence ({batch}), got {state.shape[0]}")
        return
    shape("state_indices", state_indices, batch)
    dtype("state_indices", state_indices, (torch.int32, torch.int64))


def latent_cache(
    kv_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_starts: Tensor | None,
    block_table: Tensor | None,
    batch: int,
    least_row: int,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """A cache holds one row of tokens a sequence, or is a pool of pages that `block_table` [B, max pages] picks."""
    integers = (torch.int32, torch.int64)
    if block_table is None:
        shape("kv_cache", kv_cache, batch, "S", "row")
    else:
        shape("kv_cache", kv_cache, "pages", "page", "row")
        shape("block_table", block_table, batch, "max pages")
        dtype("block_table", block_table, integers)
    dtype("kv_cache", kv_cache, dtypes)
    if kv_cache.shape[2] < least_row:
        unit = "values" if kv_cache.is_floating_point() else "bytes"
        raise ValueError(f"the rows of kv_cache must hold at least {least_row} {unit}, got {kv_cache.shape[2]}")
    for name, bound in (("cache_seqlens", cache_seqlens), ("cache_starts", cache_starts)):
        if bound is not None:
            shape(name, bound, batch)
            dtype(name, bound, integers)


def no_gradient(name: str, tensor: Tensor) -> None:
    """Of ops without a backward."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, which this op has none of, got one that does: "
            "call it under torch.no_grad()"
        )
