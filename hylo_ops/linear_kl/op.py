"""Public functions of the head's losses."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.common.sequences import working_dtype
from hylo_ops.library import define_op, reference_backend
from hylo_ops.linear_kl import chunked, reference, triton

CHUNK_TOKENS = 2048


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    mask: Tensor | None = None,
    targets: Tensor | None = None,
    ce_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int = CHUNK_TOKENS,
    backend: str | None = None,
) -> Tensor:
    """KL divergence between the next-token distributions of a teacher and a student, from their hidden states:

        p = softmax(teacher_weight @ teacher_hidden[n] / temperature);  q = softmax(weight @ hidden[n] / temperature)
        KL_n = sum_v p_v log(p_v / q_v)        direction "forward": KL(teacher || student), what distillation minimises
        KL_n = sum_v q_v log(q_v / p_v)        direction "reverse": KL(student || teacher)

    and with `targets`, from the same logits of the student, the cross-entropy of these at temperature 1:

        loss = mean_n KL_n + ce_weight * mean_n (-log softmax(weight @ hidden[n])[targets[n]])

    Logits exist for `chunk_tokens` tokens at a time.

    Dims: N tokens, D width of the student, DT width of the teacher, V vocabulary.
    Args:
        hidden: [N, D] bf16 | fp16 | fp32 | fp64. Student's final hidden states.
        weight: [V, D] any float dtype. Student's head; cast to the dtype of hidden for the products.
        teacher_hidden: [N, DT] bf16 | fp16 | fp32 | fp64.
        teacher_weight: [V, DT] any float dtype; cast to the dtype of teacher_hidden.
        temperature: > 0. There is no factor temperature ** 2.
        direction: "forward" | "reverse".
        mask: [N] bool. Whose KL counts; all tokens if None.
        targets: [N] int64. Class of each token for the cross-entropy, `ignore_index` where it does not count. A class
            that counts and is not in 0 to V - 1 makes the loss NaN: nobody waits for the device to look.
        ce_weight: of the cross-entropy; has no effect without targets.
        ignore_index: see targets. It does not take a token out of the KL.
        reduction: "mean" over the tokens that count, for each of the two losses over its own (0 if there are none), or
            "sum". Not "none": gradients are made beside the loss, for one gradient that comes in.
        chunk_tokens: tokens whose logits exist at one time; bounds the memory (docs/linear_kl.md).
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        loss: scalar fp32 (fp64 if hidden or teacher_hidden is), in nats.
    Raises:
        ValueError: a shape, dtype or option above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: products in the dtype of the hidden states with fp32 sums. Logits are fp32 on a GPU; on a CPU those of
        16-bit hidden states are rounded to their dtype first. Softmax and losses in fp32 (fp64). Autocast has no say.
        Differentiable in hidden and weight; the teacher gets no gradient: it is taken to be frozen. The gradient of
        weight is summed over chunks in fp32 and rounded to its dtype once. What a token that does not count holds, NaN
        included, reaches neither loss nor gradient. Deterministic: yes.
    Source: distillation: arXiv 1503.02531, section 2; forward KL from hidden states: HyLo (arXiv 2604.24715), stage 2;
        both directions for language models: arXiv 2306.08543, section 2.
    """
    _check(hidden, weight, targets, reduction, chunk_tokens)
    checks.shape("teacher_hidden", teacher_hidden, hidden.shape[0], "DT")
    checks.dtype("teacher_hidden", teacher_hidden, checks.FLOATS)
    checks.shape("teacher_weight", teacher_weight, weight.shape[0], teacher_hidden.shape[1])
    checks.dtype("teacher_weight", teacher_weight, checks.FLOATS)
    checks.choice("direction", direction, ("forward", "reverse"))
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    checks.same_device("hidden", hidden, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, mask=mask)
    wide = working_dtype(hidden, teacher_hidden)
    if mask is None:
        mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    checks.shape("mask", mask, len(hidden))
    checks.dtype("mask", mask, (torch.bool,))
    kl_shares, count = _shares(mask, reduction, wide)
    ce_shares = None
    if targets is not None:
        ce_shares, ce_count = _shares(targets != ignore_index, reduction, wide)
        ce_shares = ce_shares * (ce_weight * count / ce_count)
    total = _run(
        hidden, weight, teacher_hidden, teacher_weight, targets, kl_shares, ce_shares,
        temperature, direction == "reverse", chunk_tokens, backend,
    )  # fmt: skip
    return total / count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int = CHUNK_TOKENS,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the tokens that a head predicts from hidden states:

        loss = mean_n (-log softmax(weight @ hidden[n])[targets[n]])

    Logits exist for `chunk_tokens` tokens at a time.

    Dims: N tokens, D width, V vocabulary.
    Args:
        hidden: [N, D] bf16 | fp16 | fp32 | fp64.
        weight: [V, D] any float dtype; cast to the dtype of hidden for the products.
        targets: [N] int64. Class of each token, `ignore_index` where it does not count. A class that counts and is not
            in 0 to V - 1 makes the loss NaN: nobody waits for the device to look.
        reduction: "mean" over the tokens that count (0 if there are none) or "sum".
        chunk_tokens: tokens whose logits exist at one time; bounds the memory (docs/linear_kl.md).
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        loss: scalar fp32 (fp64 if hidden is), in nats.
    Raises:
        ValueError: a shape, dtype or option above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: as `linear_kl`. Differentiable in hidden and weight; deterministic: yes.
    Source: the gradient made beside the loss, chunk by chunk: Liger Kernel (arXiv 2410.10989), section 3.2.
    """
    _check(hidden, weight, targets, reduction, chunk_tokens)
    shares, count = _shares(targets != ignore_index, reduction, working_dtype(hidden))
    return _run(hidden, weight, None, None, targets, None, shares, 1.0, False, chunk_tokens, backend) / count


def _check(hidden: Tensor, weight: Tensor, targets: Tensor | None, reduction: str, chunk_tokens: int) -> None:
    checks.shape("hidden", hidden, "N", "D")
    checks.dtype("hidden", hidden, checks.FLOATS)
    checks.shape("weight", weight, "V", hidden.shape[1])
    checks.dtype("weight", weight, checks.FLOATS)
    if targets is not None:
        checks.shape("targets", targets, hidden.shape[0])
        checks.dtype("targets", targets, (torch.int64,))
    checks.same_device("hidden", hidden, weight=weight, targets=targets)
    checks.choice("reduction", reduction, ("mean", "sum"))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


def _shares(counts: Tensor, reduction: str, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which tokens count [N], as 0 and 1, and what their sum is divided by.

    The division comes last, so that gradients of 16 bits do not vanish in 1 / N.
    """
    shares = counts.to(wide)
    return shares, shares.sum().clamp(min=1) if reduction == "mean" else shares.new_ones(())


def _run(hidden: Tensor, weight: Tensor, *others: Any) -> Tensor:
    *options, backend = others
    for_hidden, for_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    with torch.autocast(hidden.device.type, enabled=False):
        total: Tensor = _forward(hidden, weight, *options, for_hidden, for_weight, backend)[0]
    return total


def _fake_forward(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    wide = working_dtype(hidden, teacher_hidden)
    return hidden.new_empty((), dtype=wide), *chunked.rooms(hidden, weight, wide, *others[-2:])


_DIFFERENTIABLE = ("hidden", "weight")
_PLAIN = reference_backend(reference.linear_kl, _DIFFERENTIABLE)


def _reference_forward(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What is saved is zeros: the reference's backward runs its forward again."""
    total = _PLAIN.forward(hidden, weight, *others)
    d_hidden, d_weight = chunked.rooms(hidden, weight, total.dtype, *others[-2:])
    return total, d_hidden.zero_(), d_weight.zero_()


def _reference_backward(grads: list[Tensor], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
    assert _PLAIN.backward is not None
    return _PLAIN.backward(grads, *inputs)


BACKENDS = [
    Backend("triton", triton.why_not, triton.forward, chunked.backward),
    Backend("chunked", chunked.why_not, chunked.forward, chunked.backward),
    Backend("reference", _PLAIN.why_not, _reference_forward, _reference_backward),
]

_forward = define_op(
    "linear_kl",
    "(Tensor hidden, Tensor weight, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? targets, "
    "Tensor? kl_shares, Tensor? ce_shares, float temperature, bool reverse, SymInt chunk_tokens, bool for_hidden, "
    "bool for_weight, str? backend) -> (Tensor, Tensor, Tensor)",
    backends=BACKENDS,
    fake=_fake_forward,
    differentiable=_DIFFERENTIABLE,
    saved=2,
)
