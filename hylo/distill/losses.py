"""The three training losses: layer-wise alignment, teacher KL, and cross-entropy without full logits.

The head losses take final hidden states and head weights, make logits for a tile of tokens at a time and keep the
gradient instead of the logits, so memory holds [tile, vocabulary] and never [tokens, vocabulary].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tile = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


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
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, chunk_tokens: int
) -> Tensor:
    """KL(teacher || student) at temperature 1 over the whole vocabulary, mean over all tokens.

    Args:
        hidden: [..., D] student's final hidden states; weight: [V, D] its head.
        teacher_hidden: [..., DT] same leading dims; teacher_weight: [V, DT]. No gradient flows to either.
        chunk_tokens: tokens whose logits exist at one time.
    Returns:
        Scalar, fp32 (float64 for float64 inputs), in nats per token.
    Numerics: logits in the autocast dtype where autocast is on, softmax and sums in fp32; deterministic.
    Source: arXiv 2604.24715, stage 2.
    """
    flat = teacher_hidden.detach().flatten(0, -2)
    matrix = teacher_weight.detach()
    flat, matrix = _compute(flat), _compute(matrix)

    def tile(logits: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        student = F.log_softmax(logits, dim=-1)
        teacher = F.log_softmax((flat[start:stop] @ matrix.T).to(logits.dtype), dim=-1)
        probability = teacher.exp()
        loss = (probability * teacher.sub_(student)).sum()
        return loss, student.exp_().sub_(probability)

    return _head_loss(hidden.flatten(0, -2), weight, tile, chunk_tokens)


def cross_entropy_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
    """Mean cross-entropy of next-token prediction in nats, from hidden states.

    Args:
        hidden: [B, T, D]; weight: [V, D]; labels: [B, T] int64, the input tokens: position t predicts t + 1.
    Returns:
        Scalar over B * (T - 1) predictions.
    """
    flat = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()

    def tile(logits: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        log_probability = F.log_softmax(logits, dim=-1)
        index = targets[start:stop, None]
        loss = -log_probability.gather(1, index).sum()
        gradient = log_probability.exp_()
        return loss, gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))

    return _head_loss(flat, weight, tile, chunk_tokens)


def _head_loss(hidden: Tensor, weight: Tensor, tile: Tile, chunk_tokens: int) -> Tensor:
    loss: Tensor = _HeadLoss.apply(hidden, weight, tile, chunk_tokens, torch.is_grad_enabled())
    return loss


class _HeadLoss(torch.autograd.Function):
    """Mean of `tile`'s losses over tokens; the gradient is made tile by tile during the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tile: Tile, chunk_tokens: int, needs_gradient: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        h, w = _compute(hidden), _compute(weight)
        want_hidden, want_weight = (needs_gradient and need for need in ctx.needs_input_grad[:2])
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(h), chunk_tokens):
                stop = min(start + chunk_tokens, len(h))
                # [tile, D] @ [D, V] -> [tile, V]
                loss, gradient = tile((h[start:stop] @ w.T).to(wide), start, stop)
                total += loss
                gradient = gradient.to(h.dtype)
                if d_hidden is not None:
                    d_hidden[start:stop] = gradient @ w
                if d_weight is not None:
                    d_weight += gradient.T @ h[start:stop]
        ctx.gradients, ctx.tokens = (d_hidden, d_weight), len(h)
        ctx.weight_dtype = weight.dtype
        return total / len(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad / ctx.tokens
        d_hidden, d_weight = ctx.gradients
        del ctx.gradients  # scaled in place below, so a second pass must fail
        if d_hidden is not None:
            d_hidden = d_hidden * scale.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(scale).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _compute(x: Tensor) -> Tensor:
    """`x` in the dtype that a matrix product takes here: autocast's where that is on."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
