"""Products with weights in fewer launches: of several at once, and into what they are added to."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hylo_ops import fused, skinny_linear, skinny_linear_add_

_ROWS = 8  # what rows are filled up to: those of the product then begin at multiples of 16 bytes, as kernels ask
_FEW, _DEPTH = 64, 16  # rows of x that `skinny_linear` takes, and what its kernels want the width to be a multiple of
_FEW_CONVOLVED = 16  # rows whose convolution costs less behind the product's sums than in a launch of its own

_settled: ContextVar[bool] = ContextVar("settled", default=False)


@contextmanager
def settled() -> Iterator[None]:
    """Inside, no work under way on the device writes weights or recurrent states: they may be read before the kernel
    ahead ends. So each layer takes one step inside, since that writes its state.
    """
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


def is_settled() -> bool:
    """Whether this is inside of `settled()`."""
    return _settled.get()


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


def _products(x: Tensor, dtype: torch.dtype, sizes: Sequence[int], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x [N, D] times several weights [rows, D], as one product in `dtype` in each direction.

    Autocast would cast x and each weight, and widen and add up a gradient of x for each weight. This sums all of them
    in the product and rounds once. What is kept are x and all weights in `dtype`, and that before there is a product:
    a recomputation, which ends with the last of what is kept, does without it.

    Returns:
        [N, size] for each of `sizes`, which say how the weights' rows are shared out.
    """
    with torch.no_grad():
        narrow, whole = x.to(dtype).detach(), _cast_together(weights, dtype).detach()
    return _Product.apply(_Factors.apply(narrow, whole, x, *weights), narrow, whole, sizes)


class _Factors(torch.autograd.Function):
    """What a product is of: keeps it, and makes the gradients."""

    @staticmethod
    def forward(ctx: Any, narrow: Tensor, whole: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        """Stands for the product, [N, rows of whole], where a gradient is handed on; has no memory or values."""
        ctx.save_for_backward(narrow, whole)
        ctx.dtypes, ctx.rows = (x.dtype, *(weight.dtype for weight in weights)), [len(weight) for weight in weights]
        return narrow.new_empty(()).expand(len(narrow), len(whole))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, whole = ctx.saved_tensors
        _, _, of_x, *of_weights = ctx.needs_input_grad
        dx = torch.mm(dy, whole).to(ctx.dtypes[0]) if of_x else None
        dweights: list[Tensor | None] = [None] * len(ctx.rows)
        if any(of_weights):
            parts = _product_in(ctx.dtypes[1], dy.T, x).split([*ctx.rows, len(whole) - sum(ctx.rows)])
            for i in (i for i, wanted in enumerate(of_weights) if wanted):
                dweights[i] = parts[i].to(ctx.dtypes[1 + i])
        return None, None, dx, *dweights


class _Product(torch.autograd.Function):
    """The product of what `_Factors` keeps."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, narrow: Tensor, whole: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.rows = len(whole)
        y = F.linear(narrow, whole)
        return (y,) if [len(whole)] == sizes else y.split([*sizes, len(whole) - sum(sizes)], dim=-1)[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _side_by_side(grads, ctx.rows), None, None, None


def _cast_together(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights [rows, D] below each other in `dtype`, with rows of zeros up to a multiple of `_ROWS`."""
    sizes = [len(weight) for weight in weights]
    filled = -(-sum(sizes) // _ROWS) * _ROWS
    if [filled] == sizes:
        return weights[0].to(dtype)
    whole = weights[0].new_empty(filled, *weights[0].shape[1:], dtype=dtype)
    *parts, fill = whole.split([*sizes, filled - sum(sizes)])
    for part, weight in zip(parts, weights, strict=True):
        part.copy_(weight)
    fill.zero_()
    return whole


def _side_by_side(parts: Sequence[Tensor], width: int) -> Tensor:
    """[N, width]: parts [N, n], and zeros behind them.

    The last ones from the first on that is no multiple of 16 bytes wide are joined by themselves: a copy of many
    columns goes in accesses of 16 bytes only if all that it joins allow that.
    """
    wide = list(itertools.takewhile(lambda part: part.shape[1] % _ROWS == 0, parts))
    rest = [*parts[len(wide) :]]
    if missing := width - sum(part.shape[1] for part in parts):
        rest.append(parts[0].new_zeros(len(parts[0]), missing))
    joined = [*wide, *([torch.cat(rest, dim=1)] if rest else [])]
    return joined[0] if len(joined) == 1 else torch.cat(joined, dim=1)


def _product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in `dtype`; where PyTorch can, its fp32 sums are written as they are."""
    cuda = a.is_cuda and torch.version.hip is None
    if cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What a product of x is in, where that is not its own choice: under autocast."""
    device = x.device.type
    # a compiler makes of autocast's casts what it wants; meta has no autocast
    if torch.compiler.is_compiling() or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)  # which leaves that as it is


class Normed:
    """x [..., D] that goes through a norm first: on its way into a product of few rows, else when `tensor` asks for it.

    Asked for twice, it is the same: so x may change once it has been asked for.
    """

    def __init__(self, x: Tensor, norm: nn.RMSNorm) -> None:
        self.x, self.norm, self.shape = x, norm, x.shape
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self.norm(self.x)
        return self._tensor


Input = Tensor | Normed


def tensor_of(x: Input) -> Tensor:
    return x.tensor() if isinstance(x, Normed) else x


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def _is_plain(layer: nn.Module) -> bool:
    """No more than a weight: an adapter, weights of fewer bits or cut up, and hooks are to be asked themselves."""
    return type(layer) is nn.Linear and not _has_hooks(layer) and not is_traceable_wrapper_subclass(layer.weight)


def project(x: Input, *groups: Iterable[nn.Linear]) -> list[Tensor]:
    """For each group what its layers, without bias, make of x [..., D], side by side."""
    layers = [list(group) for group in groups]
    found = project_at_once(x, *layers)
    if found is not None:
        return found
    x = tensor_of(x)
    if all(_is_plain(layer) for group in layers for layer in group):
        x = x.to(autocast_dtype(x) or x.dtype)  # once for all of them
    together = ([layer(x) for layer in group] for group in layers)
    return [part[0] if len(part) == 1 else torch.cat(part, dim=-1) for part in together]


def project_at_once(x: Input, *groups: Sequence[nn.Linear]) -> list[Tensor] | None:
    """`project` as columns of one product; None where each layer is better asked by itself.

    With a gradient under autocast, which casts all weights in any case; without one of weights that are packed.
    """
    every = [layer for group in groups for layer in group]
    if not all(map(_is_plain, every)):
        return None
    weights = [layer.weight for layer in every]
    sizes = [sum(layer.out_features for layer in group) for group in groups]
    whole = packed(weights)
    if whole is not None:
        y = _few_rows(x, whole)
        return _columns(F.linear(tensor_of(x), whole) if y is None else y, sizes)
    x = tensor_of(x)
    dtype = autocast_dtype(x)
    if dtype is None or not torch.is_grad_enabled():
        return None
    parts = _products(x.reshape(-1, x.shape[-1]), dtype, sizes, weights)
    return [part.view(*x.shape[:-1], part.shape[-1]) for part in parts]


def project_convolved(
    x: Input, conv_weight: Tensor, conv_state: Tensor, *groups: Sequence[nn.Linear]
) -> list[Tensor] | None:
    """`project` of one token of each sequence, the first group through a short convolution and SiLU.

    In one op, which updates `conv_state`; None where that is not for these.
    """
    every = [layer for group in groups for layer in group]
    whole = packed([layer.weight for layer in every]) if all(map(_is_plain, every)) else None
    if whole is None or not _is_few(x, whole, _FEW_CONVOLVED):
        return None
    y = _step(x, whole, conv_weight=conv_weight, conv_state=conv_state, activation="silu")
    return _columns(y, [sum(layer.out_features for layer in group) for group in groups])


def _columns(y: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The columns of y side by side, but for the last ones, which `pack_` filled up."""
    return list(y.split([*sizes, y.shape[-1] - sum(sizes)], dim=-1)[:-1])


def gated_at_once(x: Input, gate: nn.Linear, up: nn.Linear) -> Tensor | None:
    """SwiGLU of what both layers, without bias, make of x, in one op; None where that is not for these."""
    whole = packed((gate.weight, up.weight)) if _is_plain(gate) and _is_plain(up) else None
    return None if whole is None else _few_rows(x, whole[: gate.out_features + up.out_features], swiglu=True)


def product(x: Input, layer: nn.Linear) -> Tensor:
    """What the layer, without bias, makes of x."""
    if torch.is_grad_enabled():
        return project(x, (layer,))[0]
    y = _few_rows(x, layer.weight) if _is_plain(layer) else None
    return layer(tensor_of(x)) if y is None else y


def add_product(x: Tensor, layer: nn.Linear, residual: Tensor | None) -> Tensor:
    """What the layer, without bias, makes of x [B, T, N]; or `residual` [B, T, D], contiguous, which gets it added."""
    if residual is None:
        return product(x, layer)
    if not _is_few(x, layer.weight):
        residual.view(-1, residual.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), layer.weight.T)
        return residual
    return skinny_linear_add_(residual, x, layer.weight, constant_weight=is_settled())


def _few_rows(x: Input, weight: Tensor, *, swiglu: bool = False) -> Tensor | None:
    """A product of a decode step on a GPU, which takes as long as its weights' bytes; None where it is no such one."""
    if not _is_few(x, weight):
        return None
    if isinstance(x, Normed):
        return _step(x, weight, swiglu=swiglu)
    return skinny_linear(x, weight, swiglu=swiglu, constant_weight=is_settled())


def _step(x: Input, weight: Tensor, **options: Any) -> Tensor:
    """Such a product, x normed on the way into it."""
    if isinstance(x, Normed) and not _has_hooks(x.norm):
        options |= {"norm_weight": x.norm.weight, "eps": x.norm.eps}
        rows = x.x
    else:
        rows = tensor_of(x)
    y = fused.linear_step(rows.reshape(-1, 1, rows.shape[-1]), weight, constant_weight=is_settled(), **options)
    return y.view(*rows.shape[:-1], y.shape[-1])


def _is_few(x: Input, weight: Tensor, most: int = _FEW) -> bool:
    """Whether x has few rows, `most` of them, on a GPU.

    Not on a CPU, of wide numbers, nor where a gradient or a compiler looks: such products are PyTorch's.
    """
    x = x.x if isinstance(x, Normed) else x
    few = 0 < x.numel() <= most * x.shape[-1] and x.shape[-1] % _DEPTH == 0
    if not (x.is_cuda and few) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    half = x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    return half and autocast_dtype(x) in (None, x.dtype)
