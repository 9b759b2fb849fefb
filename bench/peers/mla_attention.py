"""PyTorch's own choice of a causal attention, unpinned."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from bench import forms
from bench.forms import Form, Run, Tensors

OUTPUTS = ("o",)


@dataclass(frozen=True, kw_only=True)
class AttentionInputs(forms.Inputs):
    """q [B, T, H, K], k [B, T, HK, K], v [B, T, HK, V]."""

    DIFFERENTIABLE: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    OF_TOKENS: ClassVar[tuple[str, ...]] = DIFFERENTIABLE
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def _torch(repeated: bool, inputs: AttentionInputs) -> Run:
    """Keys and values repeated for all heads inside the clock, or grouped as they are."""
    each = inputs.q.shape[2] // inputs.k.shape[2] if repeated else 1

    def forward() -> Tensors:
        k, v = (t if each == 1 else t.repeat_interleave(each, dim=2) for t in (inputs.k, inputs.v))
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, k, v))
        grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale, enable_gqa=grouped)
        return (o.transpose(1, 2),)

    return forms.plain_run(inputs, forward, OUTPUTS)


FORMS: dict[str, Form] = {"torch": partial(_torch, False), "torch_repeated": partial(_torch, True)}
