"""What one micro-batch contributes to the gradient in each kind of stage: an iterator of loss terms.

The engine runs backward on every term as it comes. Layer-wise alignment yields one term a layer, and since layers
are independent under teacher forcing, no more than one layer's activations are ever alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from hylo.distill.layers import (
    decoder_layers,
    final_hidden,
    head_weight,
    inside,
    layer_states,
    position_embeddings,
    run_layer,
)
from hylo.distill.losses import alignment_loss, cross_entropy_loss, kl_loss
from hylo.distill.recipe import CeStage, IldStage, KlStage

Autocast = Callable[[], AbstractContextManager[None]]


def loss_terms(
    stage: IldStage | KlStage | CeStage,
    student: nn.Module,
    teacher: nn.Module | None,
    input_ids: Tensor,
    autocast: Autocast,
) -> Iterator[Tensor]:
    """Scalars whose sum is the stage's loss on `input_ids` [B, T]; run backward on each before taking the next."""
    if isinstance(stage, CeStage):
        yield inside(student, lambda: _cross_entropy(stage, student, input_ids, autocast))
        return
    assert teacher is not None
    if isinstance(stage, KlStage):
        with torch.no_grad(), autocast():
            target = inside(teacher, lambda: (final_hidden(teacher, input_ids), head_weight(teacher)))
        yield inside(student, lambda: _kl(stage, student, target, input_ids, autocast))
    else:
        yield from alignment_terms(student, teacher, input_ids, stage.mixer_weight, autocast)


def completed_parts(stage: IldStage | KlStage | CeStage, student: nn.Module) -> list[list[nn.Module]]:
    """For each of `loss_terms` the student's parts that no later one gives a gradient."""
    if not isinstance(stage, IldStage):
        return [[student]]
    layers = [[layer] for layer in decoder_layers(student)]
    layers[-1].append(student.get_submodule("model.norm"))
    return layers


def alignment_terms(
    student: nn.Module, teacher: nn.Module, input_ids: Tensor, mixer_weight: float, autocast: Autocast
) -> Iterator[Tensor]:
    """Enhanced ILD, one term a layer: student layer l is fed the teacher's h_{l-1}. Source: arXiv 2604.24715."""
    targets = layer_states(teacher, input_ids)
    rotation: tuple[Tensor, Tensor] | None = None
    stream_dtype = next(student.parameters()).dtype
    for index in range(len(decoder_layers(student))):
        with autocast():
            target = next(targets)
            # The teacher may be stored in a narrower dtype; the student's residual stream keeps its own.
            entered = target.entered.to(stream_dtype)
            rotation = rotation or position_embeddings(student, entered)
            states = run_layer(student, index, entered, rotation)
            loss = alignment_loss(states.output, states.mixed, target.output, target.mixed, mixer_weight=mixer_weight)
        yield loss


def _cross_entropy(stage: CeStage, student: nn.Module, input_ids: Tensor, autocast: Autocast) -> Tensor:
    hidden = _own_hidden(student, input_ids, autocast)
    with autocast():
        return cross_entropy_loss(hidden, head_weight(student), input_ids, chunk_tokens=stage.kl_chunk_tokens)


def _kl(
    stage: KlStage, student: nn.Module, target: tuple[Tensor, Tensor], input_ids: Tensor, autocast: Autocast
) -> Tensor:
    """`target`: the teacher's hidden states and head."""
    hidden = _own_hidden(student, input_ids, autocast)
    with autocast():
        return kl_loss(
            hidden,
            head_weight(student),
            *target,
            chunk_tokens=stage.kl_chunk_tokens,
            temperature=stage.temperature,
            direction=stage.direction,
            labels=input_ids,
            ce_weight=stage.ce_weight,
        )


def _own_hidden(student: nn.Module, input_ids: Tensor, autocast: Autocast) -> Tensor:
    """Under an autocast of its own: at its end go the copies of weights that no backward reads, before the loss."""
    with autocast():
        return final_hidden(student, input_ids)
