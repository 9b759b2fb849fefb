"""The short causal convolution in the argument form of causal-conv1d 1.7, which transformers' models call too.

compat/mamba_ssm.py shows how to put both into a model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops import causal_conv1d as convolve
from hylo_ops import checks, recurrent_causal_conv1d
from hylo_ops.compat.keywords import refuse_unknown
from hylo_ops.compat.packing import bounds_of, first_states, packed

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]

_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    **of_the_model: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """`hylo_ops.causal_conv1d` with time last.

    Dims: batch, dim channels, seqlen, width (2 to 4).
    Args:
        x: [batch, dim, seqlen] bf16 | fp16 | fp32 | fp64; channels next to each other in memory are fastest.
        weight: [dim, width].
        bias: [dim].
        seq_idx: [batch, seqlen]. Runs of equal numbers are sequences: none sees another's inputs. A negative one is
            padding and gives zeros. How many they are is read on the host: one synchronisation.
        initial_states: [batch, dim, width - 1]. The inputs before the first token, oldest first.
        return_final_states: give the last width - 1 inputs of each row too; not with seq_idx.
        final_states_out: [batch, dim, width - 1]: these are written to it.
        activation: None | "silu" | "swish".
        of_the_model: what transformers passes along for others, such as `use_cache`: ignored.
    Returns:
        out: [batch, dim, seqlen], dtype of x; or (out, final_states [batch, dim, width - 1]).
    Raises:
        TypeError: an argument has a name that neither the form nor transformers' models have.
        ValueError: a shape, dtype or name above is violated, or final states with seq_idx.
        NotImplementedError: as the op.
    """
    refuse_unknown("causal_conv1d_fn", of_the_model, packed=seq_idx is not None)
    checks.shape("x", x, "batch", "dim", "seqlen")
    checks.choice("activation", activation, tuple(_ACTIVATIONS))
    batch, dim, seqlen = x.shape
    by_token, bounds = x.transpose(1, 2), None
    if initial_states is not None:
        checks.shape("initial_states", initial_states, batch, dim, weight.shape[1] - 1)
        initial_states = F.pad(initial_states, (1, 0))  # ours holds one input more, which no output needs
    if seq_idx is not None:
        if return_final_states:
            raise ValueError("return_final_states does not go with seq_idx")
        bounds = bounds_of(seq_idx, batch, seqlen)
        by_token, initial_states = packed(by_token), first_states(initial_states, bounds, batch, seqlen)
    y, final = convolve(
        by_token, weight, bias, activation=_ACTIVATIONS[activation], initial_state=initial_states, cu_seqlens=bounds
    )
    y = y.view(batch, seqlen, dim)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[..., None], 0)
    y = y.transpose(1, 2)
    if not return_final_states:
        return y
    final = final[..., 1:]
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One or several more tokens of each sequence; `conv_state` is updated in place.

    One token and a state of width inputs go through `hylo_ops.recurrent_causal_conv1d`, anything else through
    `hylo_ops.causal_conv1d` and a new state.

    Dims: batch, dim channels, seqlen, width (2 to 4), state_len inputs a state, P rows of the pool.
    Args:
        x: [batch, dim] or [batch, dim, seqlen].
        conv_state: [batch, dim, state_len], or a pool [P, dim, state_len] with `conv_state_indices`; state_len is at
            least width - 1. The last inputs, oldest first.
        weight: [dim, width].
        bias: [dim].
        activation: None | "silu" | "swish".
        cache_seqlens: must be None: states are no ring buffers here.
        conv_state_indices: [batch] int32 | int64. Row of the pool of each sequence; -1 is padding: zeros out, nothing
            written.
    Returns:
        out: shape and dtype of x.
    Raises:
        ValueError: a shape, dtype or name above is violated.
        NotImplementedError: cache_seqlens is given; as the op.
    """
    if cache_seqlens is not None:
        raise NotImplementedError("cache_seqlens is not supported: a state holds its inputs oldest first, in no ring")
    checks.choice("activation", activation, tuple(_ACTIVATIONS))
    activation = _ACTIVATIONS[activation]
    if x.ndim == 2:
        return causal_conv1d_update(
            x[..., None], conv_state, weight, bias, activation, conv_state_indices=conv_state_indices
        )[..., 0]
    checks.shape("x", x, "batch", "dim", "seqlen")
    checks.shape("conv_state", conv_state, "P", x.shape[1], "state_len")
    checks.state_pool(conv_state, conv_state_indices, x.shape[0])
    state_len, width, by_token = conv_state.shape[2], weight.shape[1], x.transpose(1, 2)
    if state_len < width - 1:
        raise ValueError(f"conv_state must hold at least {width - 1} inputs, got {state_len}")
    if x.shape[2] == 1 and state_len == width:
        return recurrent_causal_conv1d(
            by_token, weight, bias, conv_state, activation=activation, state_indices=conv_state_indices
        ).transpose(1, 2)
    rows = None if conv_state_indices is None else conv_state_indices.long()
    old = conv_state if rows is None else conv_state[rows.clamp(min=0)]
    initial = F.pad(old, (width - state_len, 0))  # the last width inputs; what is padded no output needs
    y, _ = convolve(by_token, weight, bias, activation=activation, initial_state=initial)
    new = torch.cat([old, x.to(old.dtype)], dim=-1)[..., -state_len:]
    y = y.transpose(1, 2)
    if rows is None:
        conv_state.copy_(new)
        return y
    _write_rows(conv_state, rows, old, new)
    return y.masked_fill((rows < 0)[:, None, None], 0)


def _write_rows(pool: Tensor, rows: Tensor, old: Tensor, new: Tensor) -> None:
    """Writes what is no padding. To know its number would mean to wait for the device, so padding writes what the first
    sequence does, to the same row; the old state of row 0 if all is padding.
    """
    used = rows >= 0
    first = used.int().argmax()
    rows = torch.where(used, rows, rows[first]).clamp(min=0)
    new = torch.where(used[:, None, None], new, torch.where(used[first], new[first], old[first]))
    pool.index_copy_(0, rows, new)
