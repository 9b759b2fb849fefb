"""Public function of the unit vectors."""

from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.l2_norm import reference, triton
from hylo_ops.library import define_op


def l2_norm(x: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Unit vectors along the last dim:

        y = x / sqrt(sum(x^2) + eps)

    Dims: K width of a vector; any dims before it.
    Args:
        x: [..., K] bf16 | fp16 | fp32 | fp64. Read in place where all but the last dim are strided.
        eps: added to the sum of squares, inside the root.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [..., K], contiguous, dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 inside (fp64 for fp64), rounded once; differentiable in x; deterministic: yes.
    Source: the unit queries and keys of Gated DeltaNet (arXiv 2412.06464), section 3.3.
    """
    if x.ndim == 0:
        raise ValueError("x must have shape [..., K], got []")
    checks.dtype("x", x, checks.FLOATS)
    y: Tensor = _forward(x, eps, backend)[0]
    return y


def _fake_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=working_dtype(x))


BACKENDS = [
    Backend("triton", triton.why_not, triton.forward, triton.backward),
    Backend("reference", lambda **_: None, reference.forward, reference.backward),
]

_forward = define_op(
    "l2_norm",
    "(Tensor x, float eps, str? backend) -> (Tensor, Tensor)",
    backends=BACKENDS,
    fake=_fake_forward,
    differentiable=("x",),
    saved=1,
)
