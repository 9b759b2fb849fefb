"""Public function of SwiGLU."""

from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.library import define_op, reference_backend
from hylo_ops.swiglu import reference, triton


def swiglu(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated activation of an MLP, of one product that gives both halves:

        y = silu(gate) * up,  gate_up = [gate, up],  silu(z) = z / (1 + exp(-z))

    Dims: N width of the MLP; any dims before it.
    Args:
        gate_up: [..., 2 N] bf16 | fp16 | fp32 | fp64, the gate first.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [..., N], dtype of gate_up.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 inside (fp64 for fp64), rounded once; differentiable in gate_up; deterministic: yes.
    Source: GLU variants (arXiv 2002.05202), equation 5.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have shape [..., 2 N], got {list(gate_up.shape)}")
    checks.dtype("gate_up", gate_up, checks.FLOATS)
    return _forward(gate_up, backend)


_DIFFERENTIABLE = ("gate_up",)
BACKENDS = [
    Backend("triton", triton.why_not, triton.forward, triton.backward),
    reference_backend(reference.swiglu, _DIFFERENTIABLE),
]

_forward = define_op(
    "swiglu",
    "(Tensor gate_up, str? backend) -> Tensor",
    backends=BACKENDS,
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    differentiable=_DIFFERENTIABLE,
)
