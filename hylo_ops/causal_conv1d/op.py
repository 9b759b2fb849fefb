"""Public functions of the short causal convolution."""

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.causal_conv1d import reference, triton
from hylo_ops.library import define_op, reference_backend

_ACTIVATIONS = (None, "silu")
_WIDTHS = (2, 3, 4)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution that looks back only, over all tokens:

        y_t = act(bias + sum_w weight[:, w] x_{t - W + 1 + w})

    Dims: B batch, T tokens, D channels, W width (2 to 4), N sequences (B unless packed).
    Args:
        x: [B, T, D] bf16 | fp16 | fp32 | fp64.
        weight: [D, W]. The last column meets the newest token.
        bias: [D].
        activation: None | "silu".
        initial_state: [N, D, W]. The W inputs before the first token, oldest first; zeros if None.
        cu_seqlens: [N + 1] int32. Bounds of the sequences packed into a batch of one.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [B, T, D], dtype of x.   final_state: [N, D, W], dtype of x: the last W inputs.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation (fp64 for fp64); differentiable in x, weight, bias and initial_state;
        deterministic: yes.
    Source: Mamba (arXiv 2312.00752), section 3.4.
    """
    batch, _, channels = _check(x, weight, bias, activation)
    count = checks.sequences(cu_seqlens, batch)
    if initial_state is not None:
        checks.shape("initial_state", initial_state, count, channels, weight.shape[1])
    checks.same_device("x", x, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return _forward(x, weight, bias, initial_state, cu_seqlens, activation, backend)


def recurrent_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One more token of each sequence; `state` [B, D, W] (or a pool [P, D, W]) is updated in place.

    Dims: B batch, D channels, W width (2 to 4), P rows of the pool.
    Args:
        x: [B, 1, D] bf16 | fp16 | fp32 | fp64.
        weight: [D, W].
        bias: [D] or None.
        state: [B, D, W], or [P, D, W] with `state_indices`. The last W inputs, oldest first.
        activation: None | "silu".
        state_indices: [B] int32 | int64. Row of the pool of each sequence; -1 is padding: zeros out, nothing written.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        y: [B, 1, D], dtype of x.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 accumulation (fp64 for fp64); not differentiable; deterministic: yes.
    Source: Mamba (arXiv 2312.00752), section 3.4.
    """
    batch, length, channels = _check(x, weight, bias, activation)
    if length != 1:
        raise ValueError(f"x must hold one token a sequence, got {length}")
    checks.shape("state", state, "B", channels, weight.shape[1])
    checks.state_pool(state, state_indices, batch)
    checks.same_device("x", x, weight=weight, bias=bias, state=state, state_indices=state_indices)
    return _recurrent(x, weight, bias, state, state_indices, activation, backend)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> tuple[int, int, int]:
    checks.shape("x", x, "B", "T", "D")
    checks.dtype("x", x, checks.FLOATS)
    checks.shape("weight", weight, x.shape[2], "W")
    checks.choice("the width of weight", weight.shape[1], _WIDTHS)
    if bias is not None:
        checks.shape("bias", bias, x.shape[2])
    checks.choice("activation", activation, _ACTIVATIONS)
    return x.shape[0], x.shape[1], x.shape[2]


def fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(count, x.shape[2], weight.shape[1])


_DIFFERENTIABLE = ("x", "weight", "bias", "initial_state")

BACKENDS = [
    Backend("triton", triton.why_not, triton.forward, triton.backward),
    reference_backend(reference.causal_conv1d, _DIFFERENTIABLE),
]

_forward = define_op(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, str? activation, "
    "str? backend) -> (Tensor, Tensor)",
    backends=BACKENDS,
    fake=fake_forward,
    differentiable=_DIFFERENTIABLE,
)

_recurrent = define_op(
    "recurrent_causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, Tensor? state_indices, str? activation, "
    "str? backend) -> Tensor",
    backends=[
        Backend("triton", triton.why_not, triton.recurrent_forward),
        reference_backend(reference.recurrent_causal_conv1d),
    ],
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    skips_dispatcher=True,
)
