"""The specification of sample_tokens in eager PyTorch."""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def forward(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """tokens [B] int64: the place at which sums of weights, the likeliest first, pass a row's first uniform number."""
    if temperature == 0:
        return logits.argmax(-1)
    scores, tokens = logits, None
    if top_k is not None and top_k < logits.shape[1]:
        scores, tokens = logits.topk(top_k)
    elif top_p is not None:
        scores, tokens = logits.sort(descending=True, stable=True)
    weights = (scores.to(working_dtype(logits)) / temperature).softmax(-1)
    if top_p is not None:
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    drawn = torch.searchsorted(sums, uniforms[:, :1].to(sums.dtype) * total, right=True)
    drawn = drawn.minimum((sums < total).sum(-1, keepdim=True))  # a product may be rounded to all
    return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0]
