"""Eager PyTorch form of the head's losses: the specification. It holds the logits of all tokens."""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    kl_shares: Tensor | None,
    ce_shares: Tensor | None,
    temperature: float,
    reverse: bool,
    *_: object,
) -> Tensor:
    """sum over n of kl_shares[n] KL_n + ce_shares[n] CE_n; a token whose share is 0 may hold anything."""
    wide = working_dtype(hidden, teacher_hidden)
    used = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for shares in (kl_shares, ce_shares):
        used = used if shares is None else used | (shares != 0)
    logits = _logits(hidden, weight, used, wide)
    total = logits.new_zeros(())
    if kl_shares is not None:
        assert teacher_hidden is not None
        assert teacher_weight is not None
        teacher = _logits(teacher_hidden, teacher_weight, kl_shares != 0, wide)
        p, q = ((z / temperature).log_softmax(-1) for z in (teacher, logits))
        if reverse:
            p, q = q, p
        total = total + (kl_shares * (p.exp() * (p - q)).sum(-1)).sum()
    if ce_shares is not None:
        assert targets is not None
        inside = (targets >= 0) & (targets < len(weight))
        picked = logits.log_softmax(-1).gather(1, targets.where(inside, 0)[:, None])[:, 0]
        losses = torch.where(inside | (ce_shares == 0), -picked, torch.nan)
        total = total + (ce_shares * losses).sum()
    return total


def _logits(hidden: Tensor, weight: Tensor, used: Tensor, wide: torch.dtype) -> Tensor:
    return hidden.masked_fill(~used[:, None], 0).to(wide) @ weight.to(wide).mT
