"""Public function of the RMS norm."""

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, differentiate
from hylo_ops.rms_norm import reference, triton


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dim, of x or of a residual stream that x is added to first:

        y = weight * total / rms(total),  rms(total) = sqrt(mean(total^2) + eps),  total = residual + x  or  x

    Dims: D width; any dims before it.
    Args:
        x: [..., D] bf16 | fp16 | fp32 | fp64.
        weight: [D] any float dtype.
        eps: added to the mean square.
        residual: [..., D] any float dtype. What x is added to.
        dtype: of y; that of x if None.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [..., D]; with a residual (y, total), total [..., D] in the residual's dtype.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 inside (fp64 where x or the residual is), each result rounded once; y is of the total as it is
        returned. Differentiable in x, weight and residual; deterministic: yes.
    Source: RMSNorm (arXiv 1910.07467), equation 4.
    """
    _check(x, weight, residual, dtype)
    y, total, _ = _forward(x, weight, residual, eps, dtype, backend)
    return y if residual is None else (y, total)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None, dtype: torch.dtype | None) -> None:
    if x.ndim == 0:
        raise ValueError("x must have shape [..., D], got []")
    checks.dtype("x", x, checks.FLOATS)
    checks.shape("weight", weight, x.shape[-1])
    checks.dtype("weight", weight, checks.FLOATS)
    if residual is not None:
        checks.shape("residual", residual, *x.shape)
        checks.dtype("residual", residual, checks.FLOATS)
    if dtype is not None:
        checks.choice("dtype", dtype, checks.FLOATS)
    checks.same_device("x", x, weight=weight, residual=residual)


BACKENDS = [
    Backend("triton", triton.why_not, triton.forward),
    Backend("reference", lambda **_: None, reference.forward),
]
BACKWARD_BACKENDS = [
    Backend("triton", triton.backward_why_not, triton.backward),
    Backend("reference", lambda **_: None, reference.backward),
]


def _fake_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    return x.new_empty(x.shape, dtype=dtype), total, x.new_empty(x.shape[:-1], dtype=working_dtype(x, residual))


def _fake_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, x_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (0,) if x_dtype == total.dtype else total.shape
    return total.new_empty(total.shape), total.new_empty(shape, dtype=x_dtype), weight.new_empty(weight.shape)


_forward = define_op(
    "rms_norm",
    "(Tensor x, Tensor weight, Tensor? residual, float eps, ScalarType? dtype, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    backends=BACKENDS,
    fake=_fake_forward,
)
_backward = define_op(
    "rms_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd, ScalarType x_dtype, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    backends=BACKWARD_BACKENDS,
    fake=_fake_backward,
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """For the backward: neither x nor the residual where there is a total, which the next layer keeps in any case."""
    x, weight, residual, _, _, backend = inputs
    y, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.x_dtype, ctx.y_dtype, ctx.has_residual, ctx.backend = x.dtype, y.dtype, residual is not None, backend
    ctx.save_for_backward(x if residual is None else total, weight, rstd)


def _gradients(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    if dy is None:
        dy = total.new_zeros(total.shape, dtype=ctx.y_dtype)
    dtotal = dtotal if ctx.has_residual else None
    d_total, dx, dweight = _backward(dy, dtotal, total, weight, rstd, ctx.x_dtype, ctx.backend)
    same = ctx.x_dtype == total.dtype
    return d_total if same else dx, dweight, d_total if ctx.has_residual else None, None, None, None


differentiate("rms_norm", _gradients, _keep)


def rms_norm_of_stream(
    x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of a residual stream, and the stream for what goes on beside the norm: the gradients of both are added
    in the pass that makes the norm's, where autograd would add them in one of its own.

    Dims: D width; any dims before it.
    Args:
        x, weight, eps, dtype, backend: as `rms_norm` has them.
    Returns:
        y: [..., D], that norm.   x: [..., D], a view of the input.
    Raises:
        ValueError, NotImplementedError: as `rms_norm` does.
    Numerics: as `rms_norm`; the sum of both gradients is rounded once.
    Source: RMSNorm (arXiv 1910.07467), equation 4.
    """
    _check(x, weight, None, dtype)
    y, stream = _OfStream.apply(x, weight, eps, dtype, backend)
    return y, stream


class _OfStream(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        y, _, rstd = _forward(x, weight, None, eps, dtype, backend)
        ctx.set_materialize_grads(False)
        ctx.y_dtype, ctx.backend = y.dtype, backend
        ctx.save_for_backward(x, weight, rstd)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy, dx = grads
        if dy is None:
            return dx, None, None, None, None
        dx, _, dweight = _backward(dy, dx, x, weight, rstd, x.dtype, ctx.backend)
        return dx, dweight, None, None, None
