"""A Mamba2 block between its two projections, over all tokens and as a decode step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.causal_conv1d import reference as convolution
from hylo_ops.causal_conv1d.op import recurrent_causal_conv1d
from hylo_ops.common.sequences import working_dtype
from hylo_ops.fused.convolved_ssd import convolved_ssd, split
from hylo_ops.gated_rms_norm import reference as norm
from hylo_ops.gated_rms_norm.op import gated_rms_norm
from hylo_ops.library import define_op, may_skip_dispatcher, reference_backend
from hylo_ops.ssd import cuda_mamba2
from hylo_ops.ssd import reference as ssd
from hylo_ops.ssd.op import recurrent_ssd

_WIDTHS = (2, 3, 4)


def mamba2_scan(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    *,
    d_state: int,
    x_heads: int,
    b_heads: int,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    eps: float,
    norm_before_gate: bool = False,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Mamba2 block between its projections, over all tokens: `causal_conv1d`, `chunk_ssd` and `gated_rms_norm`.

        x | b | c = silu(convolve(xbc));   o = ssd(x, dt, a, b, c);   y = weight * o silu(z) / rms(o silu(z))

    Dims: B batch, T tokens, H heads, V head width, K state width, D channels, W width of the convolution (2 to 4),
        NG norms, N sequences (B unless packed).
    Args:
        z: [B, T, H, V] bf16 | fp16 | fp32 | fp64. The gate.
        xbc: [B, T, D], dtype of z. Channels of x (x_heads heads of V), then of b (b_heads of K), then of c, which has
            as many heads of K as remain. Each number of heads divides H.
        dt: [B, T, H].
        conv_weight: [D, W]. The last column meets the newest token.
        conv_bias: [D] or None.
        a: [H], < 0: minus the exponential of `A_log`.
        norm_weight: [NG, H V / NG]. Heads side by side, cut into NG groups (NG divides H) that are normed each:
            [1, H V] is Mamba2's, [H, V] norms each head.
        d_state: K.
        x_heads, b_heads: heads of x and of b.
        d: [H]. Weight of the skip; none if None.
        dt_bias: [H]. Added to dt before the softplus.
        dt_softplus: without it dt (plus dt_bias) is the step itself and must be >= 0.
        dt_limit: (least, greatest) step; no limit if None.
        eps: added to the mean square.
        norm_before_gate: y = weight * o / rms(o) * silu(z) instead.
        conv_state: [N, D, W]. The W inputs before the first token, oldest first; zeros if None.
        initial_state: [N, H, V, K] fp32 (fp64 with fp64 inputs). Zeros if None.
        cu_seqlens: [N + 1] int32. Bounds of the sequences packed into a batch of one; empty ones are allowed.
        backend: None takes for each op the first that supports its inputs; a named one is asked of all of them.
    Returns:
        y: [B, T, H, V], dtype of z.   conv_state: [N, D, W], dtype of z: the last W inputs.
        final_state: [N, H, V, K] fp32 (fp64 with fp64 inputs).
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 inside the ops (fp64 for fp64), rounded to the dtype of z after each; differentiable in all tensors
        but cu_seqlens; deterministic: yes.
    Source: Mamba2 (arXiv 2405.21060), section 7; fewer heads of x and b: arXiv 2408.15237.
    """
    _check(z, xbc, dt, conv_weight, conv_bias, a, norm_weight, d, dt_bias, d_state, x_heads, b_heads, dt_limit)
    if conv_state is not None:
        checks.shape("conv_state", conv_state, checks.sequences(cu_seqlens, z.shape[0]), *conv_weight.shape)
        checks.same_device("z", z, conv_state=conv_state)
    o, final_state, last_inputs = convolved_ssd(
        xbc,
        conv_weight,
        conv_bias,
        dt,
        a,
        (z.shape[3], d_state, x_heads, b_heads),
        d=d,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        conv_state=conv_state,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    grouped, gate = _in_groups(o, norm_weight), _in_groups(z, norm_weight)
    y = gated_rms_norm(grouped, gate, norm_weight, eps=eps, norm_before_gate=norm_before_gate, backend=backend)
    return y.view(z.shape), last_inputs, final_state


def mamba2_step(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    d_state: int,
    x_heads: int,
    b_heads: int,
    d: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    eps: float,
    norm_before_gate: bool = False,
    state_indices: Tensor | None = None,
    settled_state: bool = False,
    backend: str | None = None,
) -> Tensor:
    """One more token of each sequence through a Mamba2 block; `conv_state` and `state` are updated in place:

        x | b | c = silu(convolve(xbc));   o = ssd(x, dt, a, b, c);   y = weight * o silu(z) / rms(o silu(z))

    Dims: B batch, H heads, V head width, K state width, D channels, W width of the convolution (2 to 4), NG norms,
        P rows of the pools.
    Args:
        z: [B, 1, H, V] bf16 | fp16 | fp32 | fp64. The gate.
        xbc: [B, 1, D], dtype of z. Channels of x (x_heads heads of V), then of b (b_heads of K), then of c, which has
            as many heads of K as remain. Each number of heads divides H.
        dt: [B, 1, H].
        conv_weight: [D, W]. The last column meets the newest token.
        conv_bias: [D] or None.
        a: [H], < 0: minus the exponential of `A_log`.
        norm_weight: [NG, H V / NG]. Heads side by side, cut into NG groups (NG divides H) that are normed each:
            [1, H V] is Mamba2's, [H, V] norms each head.
        conv_state: [B, D, W], or a pool [P, D, W] with `state_indices`. The last W inputs, oldest first.
        state: [B, H, V, K], or a pool [P, H, V, K] with `state_indices`; fp32 or bf16 (fp64 with fp64 inputs).
        d_state: K.
        x_heads, b_heads: heads of x and of b.
        d: [H]. Weight of the skip; none if None.
        dt_bias: [H]. Added to dt before the softplus.
        dt_softplus: without it dt (plus dt_bias) is the step itself and must be >= 0.
        dt_limit: (least, greatest) step; no limit if None.
        eps: added to the mean square.
        norm_before_gate: y = weight * o / rms(o) * silu(z) instead.
        state_indices: [B] int32 | int64. Row of the pools of each sequence; -1 is padding: zeros out, nothing written.
        settled_state: that no kernel that may still run on the device writes `state` or `state_indices`. Kernels may
            then read these before the one ahead has ended.
        backend: None picks the first that supports the inputs; a named one never falls back. "composed" is the three
            ops one after the other.
    Returns:
        y: [B, 1, H, V], dtype of z.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: fp32 from end to end (fp64 for fp64), rounded once into y and into each state; "composed" rounds to the
        dtype of z after each op; not differentiable; deterministic: yes.
    Source: Mamba2 (arXiv 2405.21060), section 7; fewer heads of x and b: arXiv 2408.15237.
    """
    if (backend is None or backend == "cuda") and may_skip_dispatcher():
        # fmt: off
        y = cuda_mamba2.direct()(
            z, xbc, dt, conv_weight, a, norm_weight, conv_state, state, conv_bias, d, dt_bias, state_indices,
            d_state, x_heads, b_heads, dt_softplus, dt_limit, eps, norm_before_gate,
            settled_state,
        )
        # fmt: on
        if not isinstance(y, str):
            return y
    _check(z, xbc, dt, conv_weight, conv_bias, a, norm_weight, d, dt_bias, d_state, x_heads, b_heads, dt_limit)
    _check_states(z, xbc, conv_weight, conv_state, state, state_indices, d_state)
    inputs = (z, xbc, dt, conv_weight, conv_bias, a, norm_weight, conv_state, state, d, dt_bias, state_indices)
    dims = (d_state, x_heads, b_heads)
    return _step(*inputs, *dims, dt_softplus, dt_limit, eps, norm_before_gate, settled_state, backend)


def _check(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    d_state: int,
    x_heads: int,
    b_heads: int,
    dt_limit: Sequence[float] | None,
) -> None:
    checks.shape("z", z, "B", "T", "H", "V")
    checks.dtype("z", z, checks.FLOATS)
    batch, tokens, heads, width = z.shape
    checks.shape("xbc", xbc, batch, tokens, "D")
    checks.dtype("xbc", xbc, (z.dtype,))
    checks.shape("dt", dt, batch, tokens, heads)
    channels = xbc.shape[2]
    checks.shape("conv_weight", conv_weight, channels, "W")
    checks.choice("the width of conv_weight", conv_weight.shape[1], _WIDTHS)
    if conv_bias is not None:
        checks.shape("conv_bias", conv_bias, channels)
    for name, vector in (("a", a), ("d", d), ("dt_bias", dt_bias)):
        if vector is not None:
            checks.shape(name, vector, heads)
    checks.multiple("the heads of z", heads, "x_heads", x_heads)
    checks.multiple("the heads of z", heads, "b_heads", b_heads)
    for_c = channels - x_heads * width - b_heads * d_state
    if d_state <= 0 or for_c <= 0 or for_c % d_state:
        raise ValueError(
            f"xbc must have x_heads V + b_heads d_state channels and a multiple of d_state for c, got {channels} with "
            f"x_heads {x_heads}, V {width}, b_heads {b_heads}, d_state {d_state}"
        )
    checks.multiple("the heads of z", heads, "the heads of c", for_c // d_state)
    checks.shape("norm_weight", norm_weight, "NG", "H V / NG")
    checks.multiple("the heads of z", heads, "the rows of norm_weight", norm_weight.shape[0])
    checks.shape("norm_weight", norm_weight, norm_weight.shape[0], heads * width // norm_weight.shape[0])
    if dt_limit is not None and not (len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"dt_limit must be (least, greatest), got {dt_limit}")
    others = {"conv_weight": conv_weight, "conv_bias": conv_bias, "norm_weight": norm_weight}
    checks.same_device("z", z, xbc=xbc, dt=dt, a=a, d=d, dt_bias=dt_bias, **others)


def _check_states(
    z: Tensor,
    xbc: Tensor,
    conv_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    d_state: int,
) -> None:
    if z.shape[1] != 1:
        raise ValueError(f"z must hold one token a sequence, got {z.shape[1]}")
    checks.shape("state", state, "B", z.shape[2], z.shape[3], d_state)
    checks.dtype("state", state, (torch.float32, torch.bfloat16, torch.float64))
    checks.state_pool(state, state_indices, z.shape[0])
    checks.shape("conv_state", conv_state, state.shape[0], xbc.shape[2], conv_weight.shape[1])
    checks.dtype("conv_state", conv_state, checks.FLOATS)
    checks.same_device("z", z, conv_state=conv_state, state=state, state_indices=state_indices)


def _in_groups(heads: Tensor, norm_weight: Tensor) -> Tensor:
    """[B, T, H, V] -> [B, T, NG, H V / NG]."""
    return heads.flatten(2).unflatten(-1, norm_weight.shape)


def _reference(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    d_state: int,
    x_heads: int,
    b_heads: int,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
    eps: float,
    norm_before_gate: bool,
    settled_state: bool,
) -> Tensor:
    compute = working_dtype(z, state)
    mixed = convolution.recurrent_causal_conv1d(
        xbc.to(compute), conv_weight, conv_bias, conv_state, state_indices, "silu"
    )
    x, b, c = split(mixed, (z.shape[3], d_state, x_heads, b_heads))
    o = ssd.recurrent_ssd(x, dt, a, b, c, state, d, dt_bias, state_indices, dt_softplus, dt_limit)
    grouped, gate = _in_groups(o, norm_weight), _in_groups(z.to(compute), norm_weight)
    return norm.gated_rms_norm(grouped, gate, norm_weight, eps, norm_before_gate).view(z.shape).to(z.dtype)


def _composed(
    z: Tensor,
    xbc: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    a: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    d_state: int,
    x_heads: int,
    b_heads: int,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    eps: float,
    norm_before_gate: bool,
    settled_state: bool,
) -> Tensor:
    mixed = recurrent_causal_conv1d(
        xbc, conv_weight, conv_bias, conv_state, activation="silu", state_indices=state_indices
    )
    x, b, c = split(mixed, (z.shape[3], d_state, x_heads, b_heads))
    options: dict[str, Any] = {"d": d, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    o = recurrent_ssd(x, dt, a, b, c, state, **options, state_indices=state_indices)
    grouped, gate = _in_groups(o, norm_weight), _in_groups(z, norm_weight)
    return gated_rms_norm(grouped, gate, norm_weight, eps=eps, norm_before_gate=norm_before_gate).view(z.shape)


def _composed_why_not(z: Tensor, **_: Any) -> str | None:
    """On a CPU the reference does the same and rounds less often."""
    return None if z.is_cuda else f"z is on {z.device}, not on a CUDA device"


_step = define_op(
    "mamba2_step",
    "(Tensor z, Tensor xbc, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor a, Tensor norm_weight, "
    "Tensor(a!) conv_state, Tensor(b!) state, Tensor? d, Tensor? dt_bias, Tensor? state_indices, int d_state, "
    "int x_heads, int b_heads, bool dt_softplus, float[]? dt_limit, float eps, bool norm_before_gate, "
    "bool settled_state, str? backend) -> Tensor",
    backends=[
        Backend("cuda", cuda_mamba2.why_not, cuda_mamba2.forward),
        Backend("composed", _composed_why_not, _composed),
        reference_backend(_reference),
    ],
    fake=lambda z, *_: torch.empty_like(z, memory_format=torch.contiguous_format),
)
