"""Eager PyTorch form of causal attention: the specification."""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def mla_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """All scores of all heads at once."""
    compute = working_dtype(q)
    k, v = (t.to(compute).transpose(1, 2)[:, :, None] for t in (k, v))  # [B, HK, 1, T, width]
    grouped = q.to(compute).transpose(1, 2).unflatten(1, (k.shape[1], -1))  # [B, HK, H / HK, T, K]
    scores = scale * grouped @ k.mT
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    o = scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v
    return o.flatten(1, 2).transpose(1, 2).to(q.dtype).contiguous()
