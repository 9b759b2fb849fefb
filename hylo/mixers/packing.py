"""Products with weights in fewer launches: of several at once, and into what they are added to."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 8  # what rows are filled up to: those of the product then begin at multiples of 16 bytes, as kernels ask


@torch.no_grad()
def pack_(weights: Sequence[Tensor]) -> None:
    """Moves weights [rows, ...] of one width into one storage, in this order. Values, names and shapes stay."""
    sizes = [len(weight) for weight in weights]
    first = weights[0]
    whole = first.new_zeros(-(-sum(sizes) // _ROWS) * _ROWS, *first.shape[1:])
    for part, weight in zip(whole[: sum(sizes)].split(sizes), weights, strict=True):
        part.copy_(weight)
        weight.data = part


def packed(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights as one tensor whose last rows, up to 7, mean nothing; None where they lie apart.

    None as well where gradients or a compiler must see each by itself. Where they lie is looked up at each call: what
    moved or was replaced since `pack_` is then only slower.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    first, rows = weights[0], 0
    storage = first.untyped_storage()
    width = first[0].numel()
    for weight in weights:
        behind = first.storage_offset() + rows * width
        elsewhere = weight.storage_offset() != behind or weight.untyped_storage().data_ptr() != storage.data_ptr()
        if elsewhere or not weight.is_contiguous():
            return None
        rows += len(weight)
    rows = -(-rows // _ROWS) * _ROWS
    if (first.storage_offset() + rows * width) * first.element_size() > storage.nbytes():
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[rows of all, ...]: a view of packed weights, else a copy."""
    whole = packed(weights)
    return torch.cat(list(weights)) if whole is None else whole[: sum(len(weight) for weight in weights)]


class _Narrowed(torch.autograd.Function):
    """Stands for one of several casts of `x`, with what a single one made of it; its gradient is a cast's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return narrow.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def reader(x: Tensor) -> Callable[[], Tensor]:
    """Gives each product that reads `x` what autocast would cast it to, of one copy that all of them then keep.

    One node a product, as autocast makes: their gradients are widened before they are added up.
    """
    device = x.device.type
    # a compiler sees by itself that the casts are the same; meta has no autocast
    if torch.compiler.is_compiling() or device == "meta" or not torch.is_autocast_enabled(device):
        return lambda: x
    dtype = torch.get_autocast_dtype(device)
    if x.dtype in (dtype, torch.float64):  # autocast leaves both as they are
        return lambda: x
    narrow = x.detach().to(dtype)
    return lambda: _Narrowed.apply(x, narrow)


def project(x: Tensor, *groups: Iterable[nn.Linear]) -> list[Tensor]:
    """For each group what its layers, without bias, make of x [..., D], side by side; packed weights: one product."""
    layers = [list(group) for group in groups]
    every = [layer for group in layers for layer in group]
    # an adapter, or weights of fewer bits, are more than a weight: such a layer is asked itself
    plain = all(type(layer) is nn.Linear for layer in every)
    whole = packed([layer.weight for layer in every]) if plain else None
    if whole is None:
        read = reader(x) if plain else lambda: x
        parts = ([layer(read()) for layer in group] for group in layers)
        return [part[0] if len(part) == 1 else torch.cat(part, dim=-1) for part in parts]
    sizes = [sum(layer.out_features for layer in group) for group in layers]
    return list(F.linear(x, whole).split([*sizes, len(whole) - sum(sizes)], dim=-1)[:-1])


def add_product(x: Tensor, layer: nn.Linear, residual: Tensor | None) -> Tensor:
    """What the layer, without bias, makes of x [B, T, N]; or `residual` [B, T, D], contiguous, which gets it added."""
    if residual is None:
        return layer(x)
    residual.view(-1, residual.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), layer.weight.T)
    return residual
