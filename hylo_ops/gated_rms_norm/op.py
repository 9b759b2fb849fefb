"""Public function of the gated RMS norm."""

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.gated_rms_norm import cuda, reference, triton
from hylo_ops.library import define_op, reference_backend


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, eps: float, norm_before_gate: bool, backend: str | None = None
) -> Tensor:
    """RMS norm of each head over its own width, with a SiLU gate after it or before it:

        y = weight * x / rms(x) * silu(gate)                  norm_before_gate=True, as Gated DeltaNet has it
        y = weight * z / rms(z),  z = x * silu(gate)          norm_before_gate=False, as Mamba2 has it

    with rms(x) = sqrt(mean(x^2) + eps).

    Dims: B batch, T tokens, H heads, V width of a head.
    Args:
        x: [B, T, H, V] bf16 | fp16 | fp32 | fp64.
        gate: [B, T, H, V], dtype of x.
        weight: [V], shared by the heads, or [H, V].
        eps: added to the mean square.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [B, T, H, V], dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 inside (fp64 for fp64), rounded once; differentiable in x, gate and weight; deterministic: yes.
    Source: Mamba2 (arXiv 2405.21060), section 7; Gated DeltaNet (arXiv 2412.06464), section 3.3.
    """
    checks.shape("x", x, "B", "T", "H", "V")
    checks.dtype("x", x, checks.FLOATS)
    checks.shape("gate", gate, *x.shape)
    checks.dtype("gate", gate, (x.dtype,))
    checks.shape("weight", weight, *(x.shape[3:] if weight.ndim == 1 else x.shape[2:]))
    checks.same_device("x", x, gate=gate, weight=weight)
    return _forward(x, gate, weight, eps, norm_before_gate, backend)


_DIFFERENTIABLE = ("x", "gate", "weight")
BACKENDS = [
    Backend("cuda", cuda.why_not, cuda.forward, cuda.backward),
    Backend("triton", triton.why_not, triton.forward, triton.backward),
    reference_backend(reference.gated_rms_norm, _DIFFERENTIABLE),
]

_forward = define_op(
    "gated_rms_norm",
    "(Tensor x, Tensor gate, Tensor weight, float eps, bool norm_before_gate, str? backend) -> Tensor",
    backends=BACKENDS,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    differentiable=_DIFFERENTIABLE,
)
