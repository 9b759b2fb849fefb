"""The three training losses: layer-wise alignment, teacher KL, and cross-entropy without full logits.

The head losses take final hidden states and head weights and never hold [tokens, vocabulary] (docs/linear_kl.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hylo_ops import linear_cross_entropy, linear_kl

IGNORED = -100  # target of a token that predicts nothing


def alignment_loss(
    hidden: Tensor, mixed: Tensor, teacher_hidden: Tensor, teacher_mixed: Tensor, *, mixer_weight: float
) -> Tensor:
    """One layer's Enhanced-ILD loss: mean over tokens of |h_s - h_t| + mixer_weight * |a_s - a_t|.

    Unsquared L2 norms over the width, no normalisation; the sum over layers is the caller's.

    Args:
        hidden, teacher_hidden: [B, T, D] outputs of the layer (of the final norm for the last layer).
        mixed, teacher_mixed: [B, T, D] outputs of its token mixer.
    Returns:
        Scalar, fp32 (float64 for float64 inputs).
    Source: arXiv 2604.24715, stage 1.
    """
    layer = _distance(hidden, teacher_hidden)
    return layer + mixer_weight * _distance(mixed, teacher_mixed) if mixer_weight else layer


def _distance(x: Tensor, y: Tensor) -> Tensor:
    difference = _at_least_fp32(x) - _at_least_fp32(y)
    return torch.linalg.vector_norm(difference, dim=-1).mean()


def kl_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    chunk_tokens: int,
    temperature: float = 1.0,
    direction: str = "forward",
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, mean over all tokens, and ce_weight times the cross-entropy.

    Args:
        hidden: [B, T, D] student's final hidden states; weight: [V, D] its head.
        teacher_hidden: [B, T, DT]; teacher_weight: [V, DT]. No gradient flows to either.
        chunk_tokens: tokens whose logits exist at one time.
        temperature: of both distributions of the KL.
        direction: "forward", or "reverse" for KL(student || teacher).
        labels: [B, T] int64, the input tokens, of which position t predicts t + 1; unused where ce_weight is 0.
    Returns:
        Scalar, fp32 (float64 for float64 inputs), in nats per token.
    Numerics: products in the autocast dtype where autocast is on, softmax and sums in fp32; deterministic.
    Source: arXiv 2604.24715, stage 2: temperature 1, forward, ce_weight 0.
    """
    student, teacher = (_compute(x).flatten(0, 1) for x in (hidden, teacher_hidden))
    return linear_kl(
        student,
        weight,
        teacher,
        teacher_weight,
        temperature=temperature,
        direction=direction,
        targets=_next_tokens(labels) if labels is not None and ce_weight else None,
        ce_weight=ce_weight,
        ignore_index=IGNORED,
        chunk_tokens=chunk_tokens,
    )


def cross_entropy_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
    """Mean cross-entropy of next-token prediction in nats, from hidden states.

    Args:
        hidden: [B, T, D]; weight: [V, D]; labels: [B, T] int64, the input tokens: position t predicts t + 1.
    Returns:
        Scalar over B * (T - 1) predictions.
    """
    student = _compute(hidden).flatten(0, 1)
    return linear_cross_entropy(student, weight, _next_tokens(labels), ignore_index=IGNORED, chunk_tokens=chunk_tokens)


def _next_tokens(labels: Tensor) -> Tensor:
    """Targets [B * T]. The last position's counts in no loss: to leave it out would copy the hidden states."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def _compute(x: Tensor) -> Tensor:
    """`x` in the dtype that a matrix product takes here: autocast's where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
