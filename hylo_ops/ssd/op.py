"""Public functions of the SSD scan."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend
from hylo_ops.ssd import cuda, cuda_recurrent, reference, triton


def chunk_ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fixed_split: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state-space scan of Mamba2 over all tokens, chunk by chunk. For each head, with state S [V, K]:

        s_t = clamp(softplus(dt_t + dt_bias));   S <- exp(s_t a) S + s_t x_t b_t^T;   o_t = S c_t + d x_t

    Dims: B batch, T tokens, H heads, HX, GB, G heads of x, b, c (each divides H: head h reads head h // (H / HX) of x,
        and so on), V head width, K state width, N sequences (B unless packed).
    Args:
        x: [B, T, HX, V] bf16 | fp16 | fp32 | fp64.
        dt: [B, T, H]. Sets H.
        a: [H], < 0: minus the exponential of `A_log`.
        b: [B, T, GB, K], dtype of x.
        c: [B, T, G, K], dtype of x.
        d: [H]. Weight of the skip; none if None.
        dt_bias: [H]. Added to dt before the softplus.
        dt_softplus: without it dt (plus dt_bias) is the step itself and must be >= 0.
        dt_limit: (least, greatest) step; no limit if None.
        initial_state: [N, H, V, K] fp32 (fp64 with fp64 inputs). Zeros if None.
        cu_seqlens: [N + 1] int32. Bounds of the sequences packed into a batch of one; empty ones are allowed.
        fixed_split: the same bits for a sequence whatever else is in the batch.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, T, H, V], dtype of x.   final_state: [N, H, V, K] fp32 (fp64 with fp64 inputs).
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation, step and state (fp64 for fp64); differentiable in x, dt, a, b, c, d, dt_bias and
        initial_state; deterministic: yes.
    Source: Mamba2 (arXiv 2405.21060), equation 2 and section 6; fewer heads of x and b: arXiv 2408.15237.
    """
    check_chunk(x, dt, a, b, c, d, dt_bias, dt_limit, initial_state, cu_seqlens)
    inputs = (x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens)
    o, final_state, _ = _forward(*inputs, dt_softplus, dt_limit, fixed_split, saves_states(backend), backend)
    return o, final_state


def saves_states(backend: str | None) -> bool:
    """Whether the forward hands the states that it has to the backward, so that those are not made again. How many
    there are depends on the length in steps, on which a compiled graph would have to be specialised."""
    return backend not in ("triton", "reference") and not torch.compiler.is_compiling()


def recurrent_ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    *,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One more token of each sequence; `state` is updated in place. The recurrence is `chunk_ssd`'s.

    Dims: B batch, H heads, HX, GB, G heads of x, b, c (each divides H), V head width, K state width, P rows of the
        pool.
    Args:
        x: [B, 1, HX, V] bf16 | fp16 | fp32 | fp64.
        dt: [B, 1, H]. Sets H.
        a: [H], < 0: minus the exponential of `A_log`.
        b: [B, 1, GB, K], dtype of x.
        c: [B, 1, G, K], dtype of x.
        state: [B, H, V, K], or a pool [P, H, V, K] with `state_indices`; fp32 or bf16 (fp64 with fp64 inputs).
        d: [H]. Weight of the skip; none if None.
        dt_bias: [H]. Added to dt before the softplus.
        dt_softplus: without it dt (plus dt_bias) is the step itself and must be >= 0.
        dt_limit: (least, greatest) step; no limit if None.
        state_indices: [B] int32 | int64. Row of the pool of each sequence; -1 is padding: zeros out, nothing written.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        o: [B, 1, H, V], dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation (fp64 for fp64); not differentiable; deterministic: yes.
    Source: Mamba2 (arXiv 2405.21060), equation 2.
    """
    if (backend is None or backend == "cuda") and may_skip_dispatcher():
        o = cuda_recurrent.direct()(x, dt, a, b, c, state, d, dt_bias, state_indices, dt_softplus, dt_limit)
        if not isinstance(o, str):
            return o
    heads = _check(x, dt, a, b, c, d, dt_bias, dt_limit)
    if x.shape[1] != 1:
        raise ValueError(f"x must hold one token a sequence, got {x.shape[1]}")
    checks.shape("state", state, "B", heads, x.shape[3], b.shape[3])
    checks.dtype("state", state, (torch.float32, torch.bfloat16, torch.float64))
    checks.state_pool(state, state_indices, x.shape[0])
    checks.same_device("x", x, state=state, state_indices=state_indices)
    return _recurrent(x, dt, a, b, c, state, d, dt_bias, state_indices, dt_softplus, dt_limit, backend)


def check_chunk(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: Sequence[float] | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The inputs of `chunk_ssd`; raises as that says."""
    heads = _check(x, dt, a, b, c, d, dt_bias, dt_limit)
    count = checks.sequences(cu_seqlens, x.shape[0])
    if initial_state is not None:
        checks.shape("initial_state", initial_state, count, heads, x.shape[3], b.shape[3])
    checks.same_device("x", x, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: Sequence[float] | None,
) -> int:
    """The number of heads."""
    checks.shape("x", x, "B", "T", "HX", "V")
    checks.dtype("x", x, checks.FLOATS)
    checks.shape("dt", dt, *x.shape[:2], "H")
    checks.shape("b", b, *x.shape[:2], "GB", "K")
    checks.shape("c", c, *x.shape[:2], "G", b.shape[3])
    heads = dt.shape[2]
    for name, tensor in (("x", x), ("b", b), ("c", c)):
        checks.dtype(name, tensor, (x.dtype,))
        checks.multiple("the heads of dt", heads, f"the heads of {name}", tensor.shape[2])
    for name, vector in (("a", a), ("d", d), ("dt_bias", dt_bias)):
        if vector is not None:
            checks.shape(name, vector, heads)
    if dt_limit is not None and not (len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"dt_limit must be (least, greatest), got {dt_limit}")
    checks.same_device("x", x, dt=dt, a=a, b=b, c=c, d=d, dt_bias=dt_bias)
    return heads


def fake_chunk(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
    fixed_split: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state_shape = (count, dt.shape[2], x.shape[3], b.shape[3])
    o = x.new_empty(*dt.shape, x.shape[3])
    states = cuda.saved_states(x, dt, b, c, cu_seqlens, fixed_split, save_states)
    return o, x.new_empty(state_shape, dtype=working_dtype(x, initial_state)), states


def _saving_nothing(backend: Backend) -> Backend:
    """One that makes the states again in the backward."""
    backward = backend.backward
    assert backward is not None

    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *backend.forward(*inputs[:-1]), inputs[0].new_empty(0, dtype=torch.float32)

    return dataclasses.replace(
        backend, forward=forward, backward=lambda grads, saved, *inputs: backward(grads, *inputs[:-1])
    )


_DIFFERENTIABLE = ("x", "dt", "a", "b", "c", "d", "dt_bias", "initial_state")

CHUNK_BACKENDS = [
    Backend("cuda", cuda.chunk_why_not, cuda.chunk_forward, cuda.chunk_backward, cuda.fast_backward_why_not),
    _saving_nothing(Backend("triton", triton.chunk_why_not, triton.chunk_forward, triton.chunk_backward)),
    # Where Triton's backward is the faster one.
    Backend("cuda", cuda.chunk_why_not, cuda.chunk_forward, cuda.chunk_backward),
    _saving_nothing(reference_backend(reference.chunk_ssd, _DIFFERENTIABLE)),
]

_forward = define_op(
    "chunk_ssd",
    "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool dt_softplus, float[]? dt_limit, bool fixed_split, bool save_states, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    backends=CHUNK_BACKENDS,
    fake=fake_chunk,
    differentiable=_DIFFERENTIABLE,
    saved=1,
)

_recurrent = define_op(
    "recurrent_ssd",
    "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor(a!) state, Tensor? d, Tensor? dt_bias, "
    "Tensor? state_indices, bool dt_softplus, float[]? dt_limit, str? backend) -> Tensor",
    backends=[
        Backend("cuda", cuda_recurrent.why_not, cuda_recurrent.forward),
        Backend("triton", triton.recurrent_why_not, triton.recurrent_forward),
        reference_backend(reference.recurrent_ssd),
    ],
    fake=lambda x, dt, *_: x.new_empty(*dt.shape, x.shape[3]),
)
