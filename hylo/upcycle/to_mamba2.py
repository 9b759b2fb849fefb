"""Mamba2 out of grouped-query attention: MambaInLlama's slices, and the same at a working operating point.

Both start from a freshly initialised mixer and overwrite what they know better (docs/upcycling.md).
"""

import torch
from torch import Tensor

from hylo.upcycle.base import AttentionWeights
from hylo.upcycle.calibrate import InputMoments
from hylo.upcycle.linear import before_softplus, open_gate, spread_rates


def published_mamba2(weights: AttentionWeights, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """x from W_V, B from W_K, C from W_Q, output from W_O; z, dt and all else stay as they are in `fresh`.

    Source: arXiv 2408.15237, section 3; arXiv 2604.24715.
    """
    state = {name: tensor.clone() for name, tensor in fresh.items()}
    inner = len(weights.q)
    attention = torch.cat([weights.v, weights.k, weights.q])
    state["in_proj.weight"][inner : inner + len(attention)] = attention
    state["out_proj.weight"].copy_(weights.o)
    return state


def aligned_mamba2(weights: AttentionWeights, fresh: dict[str, Tensor], moments: InputMoments) -> dict[str, Tensor]:
    """The published slices where the layer passes them on; `out_proj` is 0 and to be fitted.

    Convolutions are the present token's tap without bias, gates are open, and decay rates are spread so that the heads
    that share x and B differ most in theirs.
    """
    weights = weights.with_norms_folded(moments.second)
    state = published_mamba2(weights, fresh)
    inner = len(weights.q)
    state["in_proj.weight"][:inner] += open_gate(moments)
    state["conv1d.weight"].zero_()
    state["conv1d.weight"][:, -1] = 1
    state["conv1d.bias"].zero_()
    rates = spread_rates(weights.heads).view(-1, weights.kv_heads).T.flatten()
    state["A_log"].copy_(rates.log())
    state["dt_bias"].copy_(before_softplus(torch.ones(weights.heads)))
    state["D"].fill_(1)
    state["out_proj.weight"].zero_()
    return state
