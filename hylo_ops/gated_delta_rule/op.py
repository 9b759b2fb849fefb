"""Public functions of the gated delta rule."""

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.gated_delta_rule import cuda, cuda_recurrent, reference, triton
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fixed_split: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule over all tokens, chunk by chunk. For each value head, with state S [K, V]:

        S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   o_t = scale S^T q_t

    Dims: B batch, T tokens, G query-key heads, H value heads (a multiple of G: head h reads head h // (H / G)),
        K key width, V value width, N sequences (B unless packed).
    Args:
        q: [B, T, G, K] bf16 | fp16 | fp32 | fp64. Normalise q and k before the call.
        k: [B, T, G, K].
        v: [B, T, H, V].
        g: [B, T, H]. Log decay, <= 0; -inf empties the state.
        beta: [B, T, H]. Strength of the write, in (0, 1), or (0, 2) for negative eigenvalues.
        scale: K ** -0.5 if None.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs). Zeros if None.
        cu_seqlens: [N + 1] int32. Bounds of the sequences packed into a batch of one; empty ones are allowed.
        fixed_split: the same bits for a sequence whatever else is in the batch.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, T, H, V], dtype of v.   final_state: [N, H, K, V] fp32 (fp64 with fp64 inputs).
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation and state (fp64 for fp64); differentiable in q, k, v, g, beta and initial_state;
        deterministic: yes.
    Source: Gated Delta Networks (arXiv 2412.06464), equation 10; the chunked form of arXiv 2406.06484.
    """
    _check(q, k, v, g=g, beta=beta)
    count = checks.sequences(cu_seqlens, v.shape[0])
    if initial_state is not None:
        checks.shape("initial_state", initial_state, count, v.shape[2], q.shape[3], v.shape[3])
    checks.same_device("q", q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, cu_seqlens=cu_seqlens)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, fixed_split, backend)


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One more token of each sequence; `state` is updated in place. The recurrence is `chunk_gated_delta_rule`'s.

    Dims: B batch, G query-key heads, H value heads, K key width, V value width, P rows of the pool.
    Args:
        q: [B, 1, G, K] bf16 | fp16 | fp32 | fp64.
        k: [B, 1, G, K].
        v: [B, 1, H, V].
        g: [B, 1, H]. Log decay, <= 0; -inf empties the state.
        beta: [B, 1, H].
        state: [B, H, K, V], or a pool [P, H, K, V] with `state_indices`; fp32 or bf16 (fp64 with fp64 inputs).
        scale: K ** -0.5 if None.
        state_indices: [B] int32 | int64. Row of the pool of each sequence; -1 is padding: zeros out, nothing written.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, 1, H, V], dtype of v.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation (fp64 for fp64); not differentiable; deterministic: yes.
    Source: Gated Delta Networks (arXiv 2412.06464), equation 10.
    """
    if backend in (None, "cuda") and may_skip_dispatcher():
        o = cuda_recurrent.direct(q, k, v, g, beta, state, scale, state_indices)
        if o is not None:
            return o
    check_step(q, k, v, state, state_indices, g=g, beta=beta)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _recurrent(q, k, v, g, beta, state, scale, state_indices, backend)


def check_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, state_indices: Tensor | None, **gates: Tensor) -> None:
    """What a step of one token asks of its tensors; `gates` are [B, 1, H], under the names the caller knows."""
    _check(q, k, v, **gates)
    if v.shape[1] != 1:
        raise ValueError(f"v must hold one token a sequence, got {v.shape[1]}")
    checks.shape("state", state, "B", v.shape[2], q.shape[3], v.shape[3])
    checks.dtype("state", state, (torch.float32, torch.bfloat16, torch.float64))
    checks.state_pool(state, state_indices, v.shape[0])
    checks.same_device("q", q, k=k, v=v, **gates, state=state, state_indices=state_indices)


def _check(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> None:
    checks.shape("q", q, "B", "T", "G", "K")
    checks.dtype("q", q, checks.FLOATS)
    checks.shape("k", k, *q.shape)
    checks.shape("v", v, q.shape[0], q.shape[1], "H", "V")
    checks.multiple("the heads of v", v.shape[2], "the heads of q", q.shape[2])
    for name, gate in gates.items():
        checks.shape(name, gate, *v.shape[:3])


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    fixed_split: bool,
) -> tuple[Tensor, Tensor]:
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (count, v.shape[2], q.shape[3], v.shape[3])
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, q.new_empty(state_shape, dtype=working_dtype(q, v, initial_state))


_DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state")

_forward = define_op(
    "chunk_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool fixed_split, str? backend) -> (Tensor, Tensor)",
    backends=[
        Backend("cuda", cuda.chunk_why_not, cuda.chunk_forward, cuda.chunk_backward),
        Backend("triton", triton.chunk_why_not, triton.chunk_forward, triton.chunk_backward),
        reference_backend(reference.chunk_gated_delta_rule, _DIFFERENTIABLE),
    ],
    fake=_fake_forward,
    differentiable=_DIFFERENTIABLE,
)

_recurrent = define_op(
    "recurrent_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, float scale, Tensor? state_indices, "
    "str? backend) -> Tensor",
    backends=[
        Backend("cuda", cuda_recurrent.why_not, cuda_recurrent.forward),
        Backend("triton", triton.recurrent_why_not, triton.recurrent_forward),
        reference_backend(reference.recurrent_gated_delta_rule),
    ],
    fake=lambda q, k, v, *_: torch.empty_like(v, memory_format=torch.contiguous_format),
)
