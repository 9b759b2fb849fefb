"""Layers that keep their input and run again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# PyTorch's fused attentions. Its composed one is several operators and has no place here.
_ATTENTIONS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def recompute_layers(model: nn.Module, *, keep_attention: bool) -> None:
    """Let each layer keep its input alone in training, and run again, mixer and MLP, in the backward.

    Args:
        model: a model of transformers or HyLo's.
        keep_attention: a layer keeps as well what PyTorch's fused attention returned, o [B, H, T, V] and the log-sums
            of its weights [B, H, T] fp32, and does not run it again. A second backward over one graph is then an error.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _ATTENTIONS)
    model.gradient_checkpointing_enable(options)  # type: ignore[operator]
