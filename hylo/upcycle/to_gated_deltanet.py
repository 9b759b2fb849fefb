"""Gated DeltaNet out of grouped-query attention: the published overlap copy, and one that keeps heads together.

Both start from a freshly initialised mixer and overwrite what they know better. Why the second one helps is in
docs/upcycling.md.
"""

from torch import Tensor

from hylo.config import HyloConfig
from hylo.upcycle.base import AttentionWeights
from hylo.upcycle.calibrate import InputMoments
from hylo.upcycle.linear import before_softplus, open_gate, share_out, spread_rates


def published_gated_deltanet(weights: AttentionWeights, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """Overlap copy: keys and values repeated to all query heads, then as many rows as both sides have, in order.

    Gates, decays, convolutions and norm, and rows and columns beyond the overlap, stay as they are in `fresh`.
    Source: arXiv 2604.24715.
    """
    groups = weights.heads // weights.kv_heads
    state = {name: tensor.clone() for name, tensor in fresh.items()}
    sources = {
        "q_proj": weights.q,
        "k_proj": weights.per_head(weights.k).repeat_interleave(groups, dim=0).flatten(0, 1),
        "v_proj": weights.per_head(weights.v).repeat_interleave(groups, dim=0).flatten(0, 1),
    }
    for name, source in sources.items():
        target = state[f"{name}.weight"]
        rows = min(len(target), len(source))
        target[:rows] = source[:rows]
    output = state["o_proj.weight"]
    columns = min(output.shape[1], weights.o.shape[1])
    output[:, :columns] = weights.o[:, :columns]
    return state


def aligned_gated_deltanet(
    weights: AttentionWeights, fresh: dict[str, Tensor], config: HyloConfig, moments: InputMoments
) -> dict[str, Tensor]:
    """Heads kept together, at an operating point where they pass the signal on; `o_proj` is 0 and to be fitted.

    A GDN head gets queries, keys and values of the same heads of the base, so many side by side as its widths hold.
    Convolutions are single taps: the present token for queries and keys; values fill the wider value head as copies
    delayed by 0, 1, 2, ... tokens. Output gates are open and decay rates spread over the heads.
    """
    heads, key, value = config.linear_num_heads, config.linear_key_head_dim, config.linear_value_head_dim
    weights = weights.with_norms_folded(moments.second)
    state = {name: tensor.clone() for name, tensor in fresh.items()}
    d, width = weights.hidden_size, config.linear_conv_kernel_dim
    q, k = (state[f"{name}_proj.weight"].view(heads, key, d) for name in "qk")
    v = state["v_proj.weight"].view(heads, value, d)
    for name in "qkv":
        state[f"{name}_conv1d.weight"].zero_()
        state[f"{name}_conv1d.weight"][:, -1] = 1
    taps = state["v_conv1d.weight"].view(heads, value, width)
    for head, members in enumerate(share_out(weights.heads, heads)):
        _place_keys(q[head], k[head], weights, members)
        _place_values(v[head], taps[head], weights, members)
    state["g_proj.weight"] += open_gate(moments)
    state["A_log"].zero_()
    state["dt_bias"].copy_(before_softplus(spread_rates(heads)))
    state["o_proj.weight"].zero_()
    return state


def _place_keys(q: Tensor, k: Tensor, weights: AttentionWeights, members: list[int]) -> None:
    """Fill q and k [K, D] of one GDN head, slot by slot; several heads of the base in one slot are averaged."""
    slot = min(weights.head_dim, len(q))
    queries, keys = weights.per_head(weights.q), weights.per_head(weights.k)
    groups = weights.heads // weights.kv_heads
    slots = len(q) // slot
    shares = share_out(len(members), slots) if len(members) > slots else [[i % len(members)] for i in range(slots)]
    for i, share in enumerate(shares):
        chosen = [members[j] for j in share]
        q[i * slot : (i + 1) * slot] = queries[chosen, :slot].mean(0)
        k[i * slot : (i + 1) * slot] = keys[[head // groups for head in chosen], :slot].mean(0)


def _place_values(v: Tensor, taps: Tensor, weights: AttentionWeights, members: list[int]) -> None:
    """Fill v [V, D] and its convolution [V, W] of one GDN head: each KV head undelayed first, then one token later."""
    slot, width = min(weights.head_dim, len(v)), taps.shape[1]
    groups = weights.heads // weights.kv_heads
    values, sources = weights.per_head(weights.v), sorted({head // groups for head in members})
    slots = len(v) // slot
    if len(sources) > slots:
        sources = [sources[share[0]] for share in share_out(len(sources), slots)]
    for i in range(slots):
        rows = slice(i * slot, (i + 1) * slot)
        v[rows] = values[sources[i % len(sources)], :slot]
        taps[rows] = 0
        taps[rows, width - 1 - i // len(sources) % width] = 1
