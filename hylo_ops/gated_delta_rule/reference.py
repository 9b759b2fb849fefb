"""Eager PyTorch form of the gated delta rule: the specification, and the CPU backend.

The chunked algebra is derived in docs/gated_delta_rule.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops.common.sequences import (
    for_each_sequence,
    read_states,
    working_dtype,
    write_states,
    zero_padding,
)

_CHUNK = 64


def step_by_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other."""
    length = v.shape[1]
    state = _zero_state(q, v) if initial_state is None else initial_state.clone()
    o = v.new_zeros(v.shape)
    for t in range(length):
        step = slice(t, t + 1)
        o[:, step] = recurrent_gated_delta_rule(
            q[:, step], k[:, step], v[:, step], g[:, step], beta[:, step], state, scale, None
        )
    return o, state


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
) -> Tensor:
    """One token a sequence; `state` is updated in place."""
    compute = working_dtype(q, v, state)
    q1, k1, v1, g1, beta1 = (_heads(t, v.shape[2])[:, 0].to(compute) for t in (q, k, v, g, beta))
    s = read_states(state, state_indices).to(compute) * g1.exp()[..., None, None]
    delta = beta1[..., None] * (v1 - torch.einsum("bhkv,bhk->bhv", s, k1))
    s = s + k1[..., None] * delta[..., None, :]
    o = scale * torch.einsum("bhkv,bhk->bhv", s, q1)
    write_states(state, state_indices, s)
    return zero_padding(o[:, None].to(v.dtype), state_indices)


def chunk_gated_delta_rule(
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
    """Chunks of 64 tokens: within a chunk by matrix products, from chunk to chunk through the state.

    `fixed_split` changes nothing here: the order of sums never depends on the batch.
    """

    def one(tokens: slice, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return _one_sequence(q[:, tokens], k[:, tokens], v[:, tokens], g[:, tokens], beta[:, tokens], scale, state)

    return for_each_sequence(one, cu_seqlens, initial_state, v.shape[1])


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    compute = working_dtype(q, v, state)
    state = (_zero_state(q, v) if state is None else state).to(compute)
    length, out_dtype = v.shape[1], v.dtype
    if length == 0:
        return v.new_zeros(v.shape), state.clone()  # an op returns none of its inputs
    q, k, v, g, beta = (_chunks(_heads(t, v.shape[2]).to(compute)) for t in (q, k, v, g, beta))
    decay, from_start, to_end, whole = _decays(g)

    # [B,H,N,C,K] @ [B,H,N,K,C] -> [B,H,N,C,C]: how much token j's key still stands when token i writes
    within = (beta[..., None] * k) @ k.mT * decay
    writes = torch.cat([beta[..., None] * v, (beta * from_start)[..., None] * k], dim=-1)
    # (I + strictly lower part)^-1: solve_triangular ignores what stands above, the diagonal counts as one
    solved = torch.linalg.solve_triangular(within, writes, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    # unbind: its backward stacks once, where indexing would fill a whole zero tensor for every chunk
    per_chunk = (u, w, (to_end[..., None] * k).mT, whole[..., None, None])
    states, new_values = [], []
    for u_n, w_n, k_n, whole_n in zip(*(t.unbind(2) for t in per_chunk), strict=True):
        states.append(state)
        new_values.append(u_n - w_n @ state)  # [C,K] @ [K,V] -> [C,V]
        state = whole_n * state + k_n @ new_values[-1]  # [K,C] @ [C,V] -> [K,V]
    before, v_new = torch.stack(states, dim=2), torch.stack(new_values, dim=2)

    o = (from_start[..., None] * q) @ before + (q @ k.mT * decay) @ v_new
    o = (scale * o).flatten(2, 3)[:, :, :length].transpose(1, 2)  # [B,H,N,C,V] -> [B,T,H,V]
    return o.to(out_dtype).contiguous(), state


def _decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decay between tokens of a chunk, from the chunk's start, to its end, and over the whole of it.

    A gate of -inf empties the state. It would turn differences of sums into inf - inf, so such resets are counted
    apart: between two tokens nothing is left if their counts differ. The sums run in float64: in float32 their
    rounding alone doubles the error of the result.
    """
    resets = torch.isneginf(g)
    count = resets.cumsum(-1)
    total = g.masked_fill(resets, 0).double().cumsum(-1)  # [B,H,N,C]
    causal = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()

    def decay(exponent: Tensor, alive: Tensor) -> Tensor:
        return exponent.to(g.dtype).masked_fill(~alive, -torch.inf).exp()

    between = decay(total[..., :, None] - total[..., None, :], causal & (count[..., :, None] == count[..., None, :]))
    from_start = decay(total, count == 0)
    to_end = decay(total[..., -1:] - total, count[..., -1:] == count)
    return between, from_start, to_end, from_start[..., -1]


def _chunks(x: Tensor) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...]; padding is zeros: it writes nothing and keeps the state."""
    short = -x.shape[1] % _CHUNK
    x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, short)).unflatten(1, (-1, _CHUNK))
    return x.movedim(3, 1).contiguous()


def _heads(x: Tensor, heads: int) -> Tensor:
    """Query-key heads serve several value heads: head h reads head h // (H / G)."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _zero_state(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=working_dtype(q, v))
