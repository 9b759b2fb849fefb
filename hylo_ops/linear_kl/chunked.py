"""Logits for a chunk of tokens at a time, and their gradient at once in place of the backward (docs/linear_kl.md)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype


@dataclass(frozen=True)
class Terms:
    """What a token's loss is made of: KL if there are shares of it, cross-entropy if there are shares of that.

    Args:
        targets, kl_shares, ce_shares: [C] of a chunk's tokens, or None.
    """

    targets: Tensor | None
    kl_shares: Tensor | None
    ce_shares: Tensor | None
    temperature: float
    reverse: bool

    def of(self, tokens: slice) -> "Terms":
        targets, kl, ce = (None if t is None else t[tokens] for t in (self.targets, self.kl_shares, self.ce_shares))
        return replace(self, targets=targets, kl_shares=kl, ce_shares=ce)


# Losses [C] of a chunk's tokens times their shares, from logits [C, V] of student and teacher, which it may overwrite.
# The last tensor, if there is one, gets the gradient of the losses' sum with respect to the student's logits; it may be
# these themselves.
Rows = Callable[[Tensor, Tensor | None, Terms, Tensor | None], Tensor]


def why_not(**_: Any) -> str | None:
    """There is no input that PyTorch's operators refuse."""
    return None


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward with a chunk's losses made by PyTorch's operators."""
    return run(rows, *inputs)


def backward(grads: list[Tensor], saved: list[Tensor], hidden: Tensor, weight: Tensor, *_: Any) -> list[Tensor]:
    """What the forward made, times the gradient that came in; zeros for what nobody wanted then."""
    found = []
    for made, x in zip(saved, (hidden, weight), strict=True):
        gradient = x.new_empty(x.shape)
        # Rounded to the type of x on the way, with no room between.
        found.append(torch.mul(made, grads[0], out=gradient) if made.shape == x.shape else gradient.zero_())
    return found


def rooms(
    hidden: Tensor, weight: Tensor, wide: torch.dtype, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """Unfilled, for the gradients of hidden, in its dtype, and of weight; one that nobody wants has no elements."""
    return (
        hidden.new_empty(hidden.shape if for_hidden else 0),
        weight.new_empty(weight.shape if for_weight else 0, dtype=wide),
    )


def run(
    rows: Rows,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None,
    kl_shares: Tensor | None,
    ce_shares: Tensor | None,
    temperature: float,
    reverse: bool,
    chunk_tokens: int,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The total of the tokens' losses times their shares, and its gradients as `rooms` has them."""
    wide = working_dtype(hidden, teacher_hidden)
    terms = Terms(targets, kl_shares, ce_shares, temperature, reverse)
    chunk = min(chunk_tokens, len(hidden))
    student = _Head.of(hidden, weight, chunk, wide)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = _Head.of(teacher_hidden, teacher_weight, chunk, wide)
    gradients = student.gradient_room() if for_hidden or for_weight else None
    losses = hidden.new_empty(len(hidden), dtype=wide)
    d_hidden, d_weight = rooms(hidden, weight, wide, for_hidden, for_weight)
    d_weight.zero_()
    for begin in range(0, len(hidden), max(chunk, 1)):
        part = slice(begin, begin + chunk)
        here = terms.of(part)
        h, logits = student.logits(part, here.kl_shares, here.ce_shares)
        theirs = None if teacher is None else teacher.logits(part, here.kl_shares)[1]
        gradient = None if gradients is None else gradients[: len(h)]
        losses[part] = rows(logits, theirs, here, gradient)
        if gradient is not None and for_hidden:
            # [C, V] @ [V, D] -> [C, D]
            torch.mm(gradient, student.matrix, out=d_hidden[part])
        if gradient is not None and for_weight:
            # [V, C] @ [C, D] -> [V, D]
            _add_product(d_weight, gradient.mT, h)
    return losses.sum(dtype=torch.float64).to(wide), d_hidden, d_weight


@dataclass(frozen=True)
class _Head:
    """A model's hidden states [N, D] and head [V, D], of one dtype, and room for the logits of a chunk."""

    hidden: Tensor
    matrix: Tensor
    room: Tensor

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, chunk: int, wide: torch.dtype) -> "_Head":
        return cls(hidden, weight.to(hidden.dtype), hidden.new_empty(chunk, len(weight), dtype=wide))

    def gradient_room(self) -> Tensor:
        """Where the products take the type of the logits, their gradient takes their place."""
        same = self.hidden.dtype == self.room.dtype
        return self.room if same else torch.empty_like(self.room, dtype=self.hidden.dtype)

    def logits(self, part: slice, *shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Hidden states of a chunk and their logits.

        They are zeros where no share counts: there may be NaN, and a product with 0 does not stop it.
        """
        counted = [s != 0 for s in shares if s is not None]
        h = self.hidden[part].masked_fill(~(counted[0] | counted[-1])[:, None], 0)
        # [C, D] @ [D, V] -> [C, V]
        return h, _product(h, self.matrix.mT, self.room[: len(h)])


def rows(student: Tensor, teacher: Tensor | None, terms: Terms, gradient: Tensor | None) -> Tensor:
    """`Rows` in eager PyTorch, in any float dtype."""
    losses, slope = student.new_zeros(len(student)), student.new_zeros(())
    if teacher is not None and terms.kl_shares is not None:
        log_q, log_p = (_log_softmax(logits, terms.temperature) for logits in (student, teacher))
        kl, slope = _kl(log_q, log_p, terms.reverse)
        losses = losses + terms.kl_shares * kl
        slope = slope.mul_((terms.kl_shares / terms.temperature)[:, None])
    if terms.targets is not None and terms.ce_shares is not None:
        log_p = student.log_softmax(-1)
        inside = (terms.targets >= 0) & (terms.targets < log_p.shape[1])
        index = terms.targets.where(inside, 0)[:, None]
        picked = log_p.gather(1, index)[:, 0]
        losses = losses - terms.ce_shares * torch.where(inside | (terms.ce_shares == 0), picked, torch.nan)
        p = log_p.exp_().scatter_add_(1, index, -torch.ones_like(log_p[:, :1]))
        slope = p.mul_(terms.ce_shares[:, None]).add_(slope)
    if gradient is not None:
        gradient.copy_(slope)
    return losses


def _kl(log_q: Tensor, log_p: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """KL [C] and its gradient [C, V] by the student's logits over the temperature; overwrites its inputs."""
    if reverse:
        q, ratio = log_q.exp(), log_q.sub_(log_p)
        kl = (q * ratio).sum(-1)
        return kl, ratio.sub_(kl[:, None]).mul_(q)
    p, ratio = log_p.exp(), log_p.sub_(log_q)
    return (p * ratio).sum(-1), log_q.exp_().sub_(p)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into `out`; on a GPU the fp32 sums of 16-bit products come out as they are."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if _gives_fp32(a, out):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return out.copy_(a @ b)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, likewise."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _gives_fp32(a, total):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _gives_fp32(a: Tensor, out: Tensor) -> bool:
    return a.is_cuda and a.dtype.itemsize == 2 and out.dtype == torch.float32
