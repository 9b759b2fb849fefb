"""A decode step of a Gated DeltaNet layer, from what its projections and convolutions give to the heads' outputs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.gated_delta_rule import cuda_recurrent, reference, triton
from hylo_ops.gated_delta_rule.activation import Activation
from hylo_ops.gated_delta_rule.op import check_step
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend

_L2_NORM_EPS = 1e-6


def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    qk_l2norm: bool = True,
    allow_neg_eigval: bool = False,
    settled_state: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`recurrent_gated_delta_rule` with its activations inside: one more token of each sequence.

        g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b);   q <- q / |q|;   k <- k / |k|

    Dims: B batch, G query-key heads, H value heads, K key width, V value width, P rows of the pool.
    Args:
        q: [B, 1, G, K] bf16 | fp16 | fp32 | fp64.
        k: [B, 1, G, K].
        v: [B, 1, H, V].
        a: [B, 1, H]. What the gate's projection gives.
        b: [B, 1, H]. What the write strength's projection gives.
        A_log: [H]. Log of the gate's rate.
        dt_bias: [H].
        state: [B, H, K, V], or a pool [P, H, K, V] with `state_indices`; fp32 or bf16 (fp64 with fp64 inputs). Updated
            in place.
        scale: K ** -0.5 if None.
        state_indices: [B] int32 | int64. Row of the pool of each sequence; -1 is padding: zeros out, nothing written.
        qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6); False takes them as they are.
        allow_neg_eigval: beta = 2 sigmoid(b), so that the state's transitions can have negative eigenvalues.
        settled_state: that no kernel that may still run on the device writes `state` or `state_indices`. Kernels may
            then read these before the one ahead has ended.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, 1, H, V], dtype of v.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: activations, norms and accumulation in fp32 (fp64 for fp64), nothing rounded between; not differentiable;
        deterministic: yes.
    Source: Gated Delta Networks (arXiv 2412.06464), equation 10 and section 3.3; the gate is Mamba2's.
    """
    if backend in (None, "cuda") and may_skip_dispatcher():
        activation = _activation(A_log, dt_bias, qk_l2norm, allow_neg_eigval)
        o = cuda_recurrent.direct(q, k, v, a, b, state, scale, state_indices, activation, settled_state)
        if o is not None:
            return o
    check_step(q, k, v, state, state_indices, a=a, b=b)
    for name, parameter in (("A_log", A_log), ("dt_bias", dt_bias)):
        checks.shape(name, parameter, v.shape[2])
        checks.dtype(name, parameter, checks.FLOATS)
    checks.same_device("q", q, A_log=A_log, dt_bias=dt_bias)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = (q, k, v, a, b, A_log, dt_bias, state)
    return _step(*tensors, scale, state_indices, qk_l2norm, allow_neg_eigval, settled_state, backend)


def _activation(A_log: Tensor, dt_bias: Tensor, qk_l2norm: bool, allow_neg_eigval: bool) -> Activation:
    return Activation(A_log, dt_bias, qk_l2norm, 2.0 if allow_neg_eigval else 1.0)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    qk_l2norm: bool,
    allow_neg_eigval: bool,
    settled_state: bool,
) -> Tensor:
    compute = working_dtype(q, v, state)
    q, k, a, b, A_log, dt_bias = (t.to(compute) for t in (q, k, a, b, A_log, dt_bias))
    g = -A_log.exp() * F.softplus(a + dt_bias)
    beta = b.sigmoid() * (2 if allow_neg_eigval else 1)
    if qk_l2norm:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + _L2_NORM_EPS) for t in (q, k))
    return reference.recurrent_gated_delta_rule(q, k, v, g, beta, state, scale, state_indices)


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    qk_l2norm: bool,
    allow_neg_eigval: bool,
    settled_state: bool,
) -> tuple[Any, ...]:
    """The op's arguments in the form of the stem's own step."""
    activation = _activation(A_log, dt_bias, qk_l2norm, allow_neg_eigval)
    return q, k, v, a, b, state, scale, state_indices, activation, settled_state


_step = define_op(
    "gated_delta_rule_step",
    "(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor(a!) state, float scale, "
    "Tensor? state_indices, bool qk_l2norm, bool allow_neg_eigval, bool settled_state, str? backend) -> Tensor",
    backends=[
        Backend(
            "cuda",
            lambda **args: cuda_recurrent.why_not(*_plain(**args)),
            lambda *args: cuda_recurrent.forward(*_plain(*args)),
        ),
        Backend(
            "triton",
            lambda **args: triton.recurrent_why_not(*_plain(**args)[:6]),
            lambda *args: triton.recurrent_forward(*_plain(*args)[:-1]),  # its kernel does not begin early
        ),
        reference_backend(_reference),
    ],
    fake=lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
)
