"""Public functions of products of few rows."""

from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.library import define_op
from hylo_ops.skinny_linear import cuda, reference, triton

MOST_ROWS = 64


def skinny_linear(
    x: Tensor, weight: Tensor, *, swiglu: bool = False, constant_weight: bool = False, backend: str | None = None
) -> Tensor:
    """A product of few rows, as a decode step has it, at the rate at which memory gives the weights:

        y = x W^T,  or with swiglu  y = silu(gate) * up,  [gate, up] = x W^T,  silu(z) = z / (1 + exp(-z))

    Dims: K width of x, N width of y; any dims before them, 1 to 64 rows in all.
    Args:
        x: [..., K] bf16 | fp16 | fp32 | fp64.
        weight: [N, K], or [2 N, K] with swiglu, the gate's rows first; dtype of x.
        swiglu: whether both halves of the product are one activation.
        constant_weight: that no work still under way on the device writes the weights. Kernels may then read them
            before the one ahead has ended.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [..., N], dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated, or a gradient is wanted; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 sums (fp64 for fp64), rounded once; not differentiable; deterministic: yes.
    Source: Stream-K (arXiv 2301.03598), its fixed split; GLU variants (arXiv 2002.05202), equation 5.
    """
    _check(x, weight, 2 if swiglu else 1)
    return _product(x, weight, swiglu, constant_weight, backend)


def skinny_linear_add_(
    residual: Tensor, x: Tensor, weight: Tensor, *, constant_weight: bool = False, backend: str | None = None
) -> Tensor:
    """`skinny_linear` into what it is added to, in place:

        residual <- residual + x W^T

    Dims: K width of x, N width of the residual; any dims before them, 1 to 64 rows in all.
    Args:
        residual: [..., N], dtype of x; shares no memory with x or weight.
        x: [..., K] bf16 | fp16 | fp32 | fp64.
        weight: [N, K], dtype of x.
        constant_weight, backend: as `skinny_linear` has them.
    Returns:
        residual: [..., N], the same tensor.
    Raises:
        ValueError, NotImplementedError: as `skinny_linear` does.
    Numerics: fp32 sums (fp64 for fp64), rounded once, with the residual in them; not differentiable; deterministic:
        yes.
    Source: Stream-K (arXiv 2301.03598), its fixed split.
    """
    _check(x, weight, 1)
    checks.shape("residual", residual, *x.shape[:-1], weight.shape[0])
    checks.dtype("residual", residual, (x.dtype,))
    checks.same_device("x", x, residual=residual)
    checks.no_gradient("residual", residual)
    _sum(x, weight, residual, constant_weight, backend)
    return residual


def _check(x: Tensor, weight: Tensor, halves: int) -> None:
    if x.ndim == 0:
        raise ValueError("x must have shape [..., K], got []")
    checks.dtype("x", x, checks.FLOATS)
    rows = x.shape[:-1].numel()
    if not 0 < rows <= MOST_ROWS:
        raise ValueError(f"x must have 1 to {MOST_ROWS} rows in all, got {rows} in {list(x.shape)}")
    checks.shape("weight", weight, "N" if halves == 1 else "2 N", x.shape[-1])
    if weight.shape[0] % halves:
        raise ValueError(f"weight must have shape [2 N, K] with swiglu, got {list(weight.shape)}")
    checks.dtype("weight", weight, (x.dtype,))
    checks.same_device("x", x, weight=weight)
    checks.no_gradient("x", x)
    checks.no_gradient("weight", weight)


# Fastest first, of a product with a residual or None.
_BACKENDS = [
    Backend("cuda", cuda.why_not, cuda.forward),
    Backend("triton", triton.why_not, triton.forward),
    Backend("reference", lambda *_: None, reference.forward),
]


def _of_product(backend: Backend) -> Backend:
    return Backend(
        backend.name,
        lambda x, weight, swiglu, constant: backend.why_not(x, weight, None, swiglu, constant),
        lambda x, weight, swiglu, constant: backend.forward(x, weight, None, swiglu, constant),
    )


def _of_sum(backend: Backend) -> Backend:
    def forward(x: Tensor, weight: Tensor, residual: Tensor, constant: bool) -> None:
        backend.forward(x, weight, residual, False, constant)

    return Backend(
        backend.name,
        lambda x, weight, residual, constant: backend.why_not(x, weight, residual, False, constant),
        forward,
    )


def _fake_product(x: Tensor, weight: Tensor, swiglu: bool, constant: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // (2 if swiglu else 1)))


_product = define_op(
    "skinny_linear",
    "(Tensor x, Tensor weight, bool swiglu, bool constant, str? backend) -> Tensor",
    backends=list(map(_of_product, _BACKENDS)),
    fake=_fake_product,
    skips_dispatcher=True,
)
_sum = define_op(
    "skinny_linear_add_",
    "(Tensor x, Tensor weight, Tensor(a!) residual, bool constant, str? backend) -> ()",
    backends=list(map(_of_sum, _BACKENDS)),
    fake=lambda *_: None,
    skips_dispatcher=True,
)
