"""Eager PyTorch form of the SSD scan: the specification, and the CPU backend.

The chunked algebra is derived in docs/ssd.md.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import for_each_sequence, read_states, working_dtype, write_states, zero_padding

_CHUNK = 64


def step_by_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other."""
    state = _first_state(x, dt, b, initial_state)
    o = x.new_zeros(*dt.shape, x.shape[3])
    for t in range(x.shape[1]):
        now = slice(t, t + 1)
        o[:, now] = recurrent_ssd(
            x[:, now], dt[:, now], a, b[:, now], c[:, now], state, d, dt_bias, None, dt_softplus, dt_limit
        )
    return o, state


def recurrent_ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
) -> Tensor:
    """One token a sequence; `state` is updated in place."""
    compute = working_dtype(x, state)
    x1, b1, c1 = (_heads(t, dt.shape[2])[:, 0].to(compute) for t in (x, b, c))
    step = _step_size(dt, dt_bias, dt_softplus, dt_limit, compute)[:, 0]
    decay = (step * a.to(compute)).exp()
    h = decay[..., None, None] * read_states(state, state_indices).to(compute)
    h = h + (step[..., None] * x1)[..., None] * b1[..., None, :]  # [V, 1] * [1, K] -> [V, K]
    o = torch.einsum("bhvk,bhk->bhv", h, c1)
    if d is not None:
        o = o + d.to(compute)[:, None] * x1
    write_states(state, state_indices, h)
    return zero_padding(o[:, None].to(x.dtype), state_indices)


def chunk_ssd(
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
) -> tuple[Tensor, Tensor]:
    """Chunks of 64 tokens: within a chunk by matrix products, from chunk to chunk through the state.

    `fixed_split` runs a batch as packed sequences, one after the other: a CPU's batched products round a sequence
    differently beside others.
    """
    batch, length = x.shape[:2]
    if fixed_split and batch > 1:
        cu_seqlens = length * torch.arange(batch + 1, device=x.device)
        x, dt, b, c = (t.flatten(0, 1)[None] for t in (x, dt, b, c))
        o, final_state = chunk_ssd(
            x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens, dt_softplus, dt_limit, fixed_split
        )
        return o.view(batch, length, *o.shape[2:]), final_state
    compute = working_dtype(x, initial_state)

    def one(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        step = _step_size(dt[:, tokens], dt_bias, dt_softplus, dt_limit, compute)
        return _one_sequence(x[:, tokens], step, a, b[:, tokens], c[:, tokens], d, state)

    return for_each_sequence(one, cu_seqlens, initial_state, x.shape[1])


def _one_sequence(
    x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    compute, (batch, length, heads), dtype = step.dtype, step.shape, x.dtype
    state = _first_state(x, step, b, state).to(compute)
    if length == 0:
        return x.new_zeros(batch, 0, heads, x.shape[3]), state
    between, from_start, to_end, whole = _decays(_chunks(step * a.to(compute)))
    x, b, c = (_heads(t, heads).to(compute) for t in (x, b, c))
    skip = None if d is None else d.to(compute)[:, None] * x
    writes, b, c = _chunks(step[..., None] * x), _chunks(b), _chunks(c)

    carried = (to_end[..., None] * writes).mT @ b  # [V, C] @ [C, K] -> [V, K]
    states = []
    for n in range(writes.shape[2]):
        states.append(state)
        state = whole[:, :, n, None, None] * state + carried[:, :, n]
    before = torch.stack(states, dim=2)  # [B, H, N, V, K]

    o = from_start[..., None] * (c @ before.mT) + (b @ c.mT * between).mT @ writes  # both [C, V]
    o = o.flatten(2, 3)[:, :, :length].transpose(1, 2)  # [B, H, N, C, V] -> [B, T, H, V]
    return (o if skip is None else o + skip).to(dtype).contiguous(), state


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the log decays [..., C], what is left: at token i, of what token j wrote ([..., j, i]); at token i, of the
    state before the chunk; at the chunk's end, of what token j wrote; at its end, of the state before.

    Every exponent is a sum of its own, not a difference of two running sums: one strong gate cancels no later weak
    ones, and gates of -inf do no harm.
    """
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)  # row j, column i: i > j
    sums = g[..., None, :].masked_fill(~later, 0).cumsum(-1)
    between = sums.masked_fill(later.mT, -torch.inf).exp()
    from_start = g.cumsum(-1).exp()
    return between, from_start, between[..., -1], from_start[..., -1]


def _step_size(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: Sequence[float] | None, compute: torch.dtype
) -> Tensor:
    step = dt.to(compute)
    if dt_bias is not None:
        step = step + dt_bias.to(compute)
    if dt_softplus:
        step = F.softplus(step)
    return step if dt_limit is None else step.clamp(dt_limit[0], dt_limit[1])


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]; a padding token has step 0: it keeps the state and writes nothing."""
    x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -x.shape[1] % _CHUNK)).unflatten(1, (-1, _CHUNK))
    return x.movedim(3, 1).contiguous()


def _heads(x: Tensor, heads: int) -> Tensor:
    """Head h reads head h // (H / the heads there are)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _first_state(x: Tensor, dt: Tensor, b: Tensor, given: Tensor | None) -> Tensor:
    """A tensor of its own, never the caller's: an op must not return one of its inputs."""
    if given is not None:
        return given.clone()
    return x.new_zeros(x.shape[0], dt.shape[2], x.shape[3], b.shape[3], dtype=working_dtype(x))
