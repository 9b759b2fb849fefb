"""The SSD scan in the argument form of mamba-ssm 2.3, which transformers' Mamba2, Bamba, Zamba2 and others call too.

from hylo_ops.compat import causal_conv1d, mamba_ssm
from transformers.models.bamba import modeling_bamba as bamba

bamba.mamba2_chunk_scan = mamba_ssm.mamba_chunk_scan_combined
bamba.mamba2_selective_state_update = mamba_ssm.selective_state_update
bamba.causal_conv1d_fn = causal_conv1d.causal_conv1d_fn
bamba.causal_conv1d_update = causal_conv1d.causal_conv1d_update
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops import checks, chunk_ssd, recurrent_ssd
from hylo_ops.compat.keywords import refuse_unknown
from hylo_ops.compat.packing import bounds_of, first_states, last_of_rows, packed

__all__ = ["mamba_chunk_scan_combined", "selective_state_update"]

_NO_LIMIT = (0.0, float("inf"))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    **of_the_model: object,
) -> Tensor | tuple[Tensor, ...]:
    """`hylo_ops.chunk_ssd` on the form's own layout; its docstring has the recurrence.

    Dims: batch, seqlen, nheads, headdim, dstate, ngroups (divides nheads).
    Args:
        x: [batch, seqlen, nheads, headdim] bf16 | fp16 | fp32 | fp64.
        dt: [batch, seqlen, nheads].
        A: [nheads], < 0.
        B: [batch, seqlen, ngroups, dstate], dtype of x.
        C: [batch, seqlen, ngroups, dstate], dtype of x.
        chunk_size: changes no result: ignored.
        D: [nheads] or [nheads, headdim].
        z: [batch, seqlen, nheads, headdim]. The output is multiplied by silu(z), in fp32.
        dt_bias: [nheads].
        initial_states: [batch, nheads, headdim, dstate]; computed with in fp32. With seq_idx the first sequence of each
            row starts from its row's.
        seq_idx: [batch, seqlen]. Runs of equal numbers are sequences: the state is reset between them. How many they
            are is read on the host (one synchronisation), unless cu_seqlens says it.
        cu_seqlens: [N + 1] int32 | int64, for a batch of one: the bounds of the runs in seq_idx, which must come too.
        dt_limit: (least, greatest) step, after the softplus.
        return_final_states: give the states after each row's last token too.
        return_varlen_states: give the states after each sequence of cu_seqlens too.
        of_the_model: what transformers passes along for others, such as `use_cache`: ignored.
    Returns:
        out: [batch, seqlen, nheads, headdim], dtype of x; alone, or followed by what was asked for, in this order:
        final_states: [batch, nheads, headdim, dstate] fp32.   varlen_states: [N, nheads, headdim, dstate] fp32.
    Raises:
        TypeError: an argument has a name that neither the form nor transformers' models have.
        ValueError: a shape or dtype above is violated, cu_seqlens without seq_idx, or varlen states without either.
        NotImplementedError: as the op.
    """
    refuse_unknown("mamba_chunk_scan_combined", of_the_model, packed=seq_idx is not None)
    if cu_seqlens is None and return_varlen_states:
        raise ValueError("return_varlen_states needs cu_seqlens")
    if cu_seqlens is not None and seq_idx is None:
        raise ValueError("cu_seqlens needs seq_idx, which marks where the state is reset")
    batch, seqlen = x.shape[:2]
    xs, dts, bs, cs = x, dt, B, C
    initial = None if initial_states is None else _wide(initial_states)
    bounds = None
    if seq_idx is not None:
        checks.sequences(cu_seqlens, batch)
        bounds = bounds_of(seq_idx, batch, seqlen) if cu_seqlens is None else cu_seqlens.int()
        xs, dts, bs, cs = (packed(t) for t in (x, dt, B, C))
        initial = first_states(initial, bounds, batch, seqlen)
    o, final = chunk_ssd(
        xs,
        dts,
        A,
        bs,
        cs,
        d=D if D is not None and D.ndim == 1 else None,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=None if dt_softplus and dt_limit == _NO_LIMIT else dt_limit,
        initial_state=initial,
        cu_seqlens=bounds,
    )
    o = o.view(batch, seqlen, *o.shape[2:])
    results = [_skipped_and_gated(o, x, D if D is not None and D.ndim == 2 else None, z)]
    if return_final_states:
        results.append(final if bounds is None else final[last_of_rows(bounds, batch, seqlen)])
    if return_varlen_states:
        results.append(final)
    return tuple(results) if len(results) > 1 else results[0]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    **of_the_model: object,
) -> Tensor:
    """One more token of each sequence by `hylo_ops.recurrent_ssd`; `state` is updated in place.

    Dims: batch, nheads, dim (of a head), dstate, ngroups (divides nheads), P rows of the pool.
    Args:
        state: [batch, nheads, dim, dstate], or a pool [P, nheads, dim, dstate] with `state_batch_indices`; fp32 | bf16.
        x: [batch, nheads, dim] bf16 | fp16 | fp32 | fp64.
        dt: [batch, nheads, dim], as A, D and dt_bias one number a head, repeated by expand (stride 0).
        A: [nheads, dim, dstate], < 0.
        B: [batch, ngroups, dstate], dtype of x.
        C: [batch, ngroups, dstate], dtype of x.
        D: [nheads, dim].
        z: [batch, nheads, dim]. The output is multiplied by silu(z), in fp32.
        dt_bias: [nheads, dim].
        state_batch_indices: [batch] int32 | int64. Row of the pool of each sequence; -1 is padding.
        of_the_model: what transformers passes along for others: ignored.
    Returns:
        out: [batch, nheads, dim], dtype of x.
    Raises:
        TypeError: an argument has a name that neither the form nor transformers' models have.
        ValueError: as the op.
        NotImplementedError: a state without heads, as Mamba1's; numbers that differ within a head; as the op.
    """
    refuse_unknown("selective_state_update", of_the_model)
    if state.ndim != 4:
        raise NotImplementedError(
            "state must have shape [batch, nheads, dim, dstate], Mamba1's without heads is not supported: "
            f"got {list(state.shape)}"
        )
    o = recurrent_ssd(
        x[:, None],
        _number_of_head("dt", dt)[:, None],
        _number_of_head("A", A, dims=2),
        B[:, None],
        C[:, None],
        state,
        d=None if D is None else _number_of_head("D", D),
        dt_bias=None if dt_bias is None else _number_of_head("dt_bias", dt_bias),
        dt_softplus=dt_softplus,
        state_indices=state_batch_indices,
    )
    return _skipped_and_gated(o[:, 0], x, None, z)


def _number_of_head(name: str, expanded: Tensor, dims: int = 1) -> Tensor:
    """Without the last dims, over which the numbers are repeated."""
    inner = zip(expanded.shape[-dims:], expanded.stride()[-dims:], strict=True)
    if any(size != 1 and stride != 0 for size, stride in inner):
        raise NotImplementedError(
            f"{name} must be one number a head, repeated by expand (stride 0) over its last dims: values that differ "
            f"within a head are not supported; got shape {list(expanded.shape)}, strides {expanded.stride()}"
        )
    return expanded[..., 0] if dims == 1 else expanded[..., 0, 0]


def _skipped_and_gated(o: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(o + D x) silu(z) in fp32."""
    if D is None and z is None:
        return o
    y = _wide(o)
    if D is not None:
        y = y + _wide(D) * _wide(x)
    if z is not None:
        checks.shape("z", z, *x.shape)
        y = y * F.silu(_wide(z))
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """fp32 of what is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
