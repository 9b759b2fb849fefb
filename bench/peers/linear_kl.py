"""The head's losses in other libraries: each a call that gives the loss and the gradients of hidden states and head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import Missing, imported

NAMES = ("loss", "dhidden", "dweight")


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """What every contestant gets: a teacher for the KL, or targets for the cross-entropy."""

    hidden: Tensor  # [N, D], wants a gradient
    weight: Tensor  # [V, D], wants a gradient
    teacher_hidden: Tensor | None = None  # [N, DT]
    teacher_weight: Tensor | None = None  # [V, DT]
    targets: Tensor | None = None  # [N]


Step = Callable[[], tuple[Tensor, ...]]
Form = Callable[[HeadInputs], Step]


def step(inputs: HeadInputs, loss: Callable[[], Tensor]) -> Step:
    """Forward and backward of a mean over tokens."""

    def run() -> tuple[Tensor, ...]:
        value = loss()
        return value.detach(), *torch.autograd.grad(value, (inputs.hidden, inputs.weight))

    return run


def _torch(inputs: HeadInputs) -> Step:
    """Eager PyTorch on the logits of all tokens, rounded to the inputs' dtype as a model's are."""
    i = inputs

    def loss() -> Tensor:
        log_q = F.log_softmax(F.linear(i.hidden, i.weight).float(), dim=-1)
        if i.teacher_hidden is None:
            return F.nll_loss(log_q, i.targets)
        with torch.no_grad():
            log_p = F.log_softmax(F.linear(i.teacher_hidden, i.teacher_weight).float(), dim=-1)
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return step(inputs, loss)


def _fla(inputs: HeadInputs) -> Step:
    i = inputs
    if i.teacher_hidden is None:
        cross_entropy = imported("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
        return step(inputs, lambda: cross_entropy(i.hidden, i.targets, i.weight))
    kl = imported("fla.modules.fused_kl_div", "fused_kl_div_loss")
    return step(inputs, lambda: kl(i.hidden, i.teacher_hidden, i.weight, i.teacher_weight))


def _liger(inputs: HeadInputs, accum_dtype: torch.dtype | None = None) -> Step:
    """Its generalised JSD is the forward KL at beta 0."""
    i = inputs
    if i.teacher_hidden is None:
        name = "LigerFusedLinearCrossEntropyLoss"
        cross_entropy = imported("liger_kernel.transformers.fused_linear_cross_entropy", name)(accum_dtype=accum_dtype)
        return step(inputs, lambda: cross_entropy(i.weight, i.hidden, i.targets))
    jsd = imported("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
    kl = jsd(jsd_beta=0.0, accum_dtype=accum_dtype)
    return step(inputs, lambda: kl(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, None))


def _liger_fp32(inputs: HeadInputs) -> Step:
    """With the head's gradient summed over chunks in fp32, as ours is."""
    return _liger(inputs, torch.float32)


def _liger_chunked(inputs: HeadInputs) -> Step:
    """Its other fused distillation loss, which torch.compile makes, at its own default of 1024 tokens a chunk."""
    i = inputs
    if i.teacher_hidden is None:
        raise Missing("is a distillation loss")
    function = imported("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")
    kl = function(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    targets = torch.zeros(len(i.hidden), dtype=torch.int64, device=i.hidden.device)
    return step(inputs, lambda: kl(i.hidden, i.weight, i.teacher_hidden, i.teacher_weight, targets))


FORMS: dict[str, Form] = {
    "torch": _torch,
    "fla": _fla,
    "liger": _liger,
    "liger_fp32": _liger_fp32,
    "liger_chunked": _liger_chunked,
}
