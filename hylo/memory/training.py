"""Bytes on the device in each phase of a training step, by the formulas of docs/memory.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from hylo.config import HyloConfig
from hylo.distill.recipe import Checkpointing
from hylo.memory import activations, shares
from hylo.memory.activations import STREAM, Numbers
from hylo.memory.counts import Counts, parameter_counts, up_projection

WIDE = 4  # bytes of a weight, a gradient, a moment: all of the student's are fp32
TOKEN = 8  # bytes of an id


@dataclass(frozen=True)
class Job:
    """One micro-batch of a stage on one GPU.

    Args:
        teacher: configuration, None for a stage without one.
        kind: "ild", "kl" or "ce".
        batch, length: sequences, and tokens of each.
        accumulates: each GPU has several micro-batches in a step, so gradients are there from the first one on.
        half: autocast in bf16, and a teacher in bf16.
        checkpointing: layers keep their input alone, "selective" what attention returned as well.
        tile: tokens that an MLP sees at one time; None for all.
        chunk: tokens whose logits exist at one time.
        trainable: what gets gradients.
        gpus: that share parameters, gradients, optimiser and teacher.
        cuda: as opposed to a CPU, whose norms keep more.
    """

    student: HyloConfig
    teacher: Any
    kind: str
    batch: int
    length: int
    accumulates: bool
    half: bool
    checkpointing: Checkpointing
    tile: int | None
    chunk: int
    trainable: Counts
    gpus: int = 1
    cuda: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def numbers(self) -> Numbers:
        return Numbers(self.half, self.cuda)

    @property
    def tiled(self) -> bool:
        return self.tile is not None and self.tile < self.tokens

    @property
    def tile_tokens(self) -> int:
        return self.tokens if self.tile is None else min(self.tile, self.tokens)

    @property
    def trained(self) -> int:
        """Elements that get a gradient: layer-wise alignment reaches neither embedding nor head."""
        whole = self.trainable.total
        return whole - self.trainable.embedding - self.trainable.head if self.kind == "ild" else whole


@dataclass(frozen=True)
class Phase:
    """What is on the device at the fullest moment of one phase, in bytes.

    Args:
        weight_copies: 16-bit copies of the student's weights that autocast makes.
        activations: what the student keeps for its backward.
        room: what the phase needs for itself and gives back.
        loss: hidden states on the way to the loss, its room, and the gradients it has made.
        teacher: its parameters and activations.
    """

    name: str
    parameters: int = 0
    gradients: int = 0
    optimiser: int = 0
    weight_copies: int = 0
    activations: int = 0
    room: int = 0
    loss: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(field.name for field in fields(Phase) if field.name != "name")


def phases(job: Job) -> list[Phase]:
    """The phases of a training step in their order; the largest total is the step's peak."""
    return [*(_alignment(job) if job.kind == "ild" else _whole_model(job)), _step(job)]


def peak(job: Job) -> Phase:
    return max(phases(job), key=lambda phase: phase.total)


def kept_for_backward(job: Job) -> int:
    """What stays between forward and backward of the student up to its final norm, weights left out."""
    layers = len(job.trainable.layers)
    within_all = job.tokens * (TOKEN + activations.FACTOR) + _rotation(job)
    return within_all + _streams(job, layers) + sum(_waiting(job, i) for i in range(layers))


# ---------------------------------------------------------------- what is always there


# Layers of a model that several GPUs have whole, or on its way, in a phase: the one at work and the next one.
_STUDENT_LAYERS = {"student forward": 2, "backward": 2}
_TEACHER_LAYERS = {"teacher forward": 2}
_STUDENT_SHARED = ("teacher forward", "optimiser step")  # phases that want nothing of the student's root


def _phase(job: Job, name: str, *, done: int | None, **parts: int) -> Phase:
    """Args: done: layers from the last one back whose gradients are there; None where all are for another reason."""
    student = parameter_counts(job.student)
    # Alignment calls layers alone, never the student.
    root = job.kind != "ild" and name not in _STUDENT_SHARED
    return Phase(
        name,
        parameters=shares.held(student, WIDE, job.gpus, root=root, layers=_STUDENT_LAYERS.get(name, 0)),
        gradients=WIDE * (_gradients(job, done) if job.gpus == 1 else _shared_gradients(job, name, done)),
        optimiser=2 * WIDE * job.trained // job.gpus,
        teacher=_teacher(job, name) + parts.pop("teacher", 0),
        **parts,
    )


def _teacher(job: Job, name: str) -> int:
    """Of a sharded one embedding and head stay whole, since no backward ends their use."""
    if job.teacher is None:
        return 0
    # What was gathered for a layer goes with the next one, which in an alignment is after the student's backward.
    layers = _TEACHER_LAYERS.get(name, 1 if job.kind == "ild" and name == "backward" else 0)
    return shares.held(parameter_counts(job.teacher), job.numbers.size, job.gpus, root=True, layers=layers)


def _gradients(job: Job, done: int | None) -> int:
    """Elements: all of them after the first micro-batch; in the first those that the backward has come to."""
    if job.accumulates or done is None:
        return job.trained
    outside = 0 if job.kind == "ild" else job.trainable.head + job.trainable.norm
    return outside * bool(done) + _reached(job, done)


def _shared_gradients(job: Job, name: str, done: int | None) -> int:
    """The same on several GPUs, in the pass that shares them out: what earlier passes left is whole until then."""
    if name == "optimiser step":
        return job.trained // job.gpus
    if done is None:
        return shares.last_gradients(job.trainable, job.gpus)
    left = job.trained if job.accumulates else 0
    if name != "backward":
        return left
    outside = 0 if job.kind == "ild" else job.trainable.head
    return shares.gradients(job.trainable, job.gpus, left=left, outside=outside, before=_reached(job, done - 1))


def _reached(job: Job, done: int) -> int:
    """Elements of the layers whose backward is over: alignment goes through them from the first one on."""
    layers = job.trainable.layers
    return sum(layers[:done] if job.kind == "ild" else layers[len(layers) - done :])


# ---------------------------------------------------------------- kl and ce: the whole model at once


def _whole_model(job: Job) -> Iterator[Phase]:
    layers, d = len(job.trainable.layers), job.student.hidden_size
    kept = kept_for_backward(job)
    theirs = 0 if job.teacher is None else job.tokens * job.numbers.size * job.teacher.hidden_size
    if job.teacher is not None:
        yield _phase(job, "teacher forward", done=0, teacher=theirs + _teacher_room(job))
    copies = sum(_kept_weights(job, i) for i in range(layers))
    held = {"done": 0, "activations": kept, "teacher": theirs, "weight_copies": copies}
    yield _phase(job, "student forward", **held, room=_student_room(job))
    hidden = job.tokens * job.numbers.size * d
    yield _phase(job, "loss", **held, loss=hidden + loss_room(job))
    made = 3 * hidden + job.tokens * STREAM * d + 2 * WIDE * _head(job)
    yield _phase(job, "loss backward", **held, loss=made)
    yield max((_layer_backward(job, i) for i in range(layers)), key=lambda phase: phase.total)
    room = WIDE * job.trainable.embedding * job.accumulates + job.tokens * STREAM * d
    yield _phase(job, "embedding backward", done=None, room=room, activations=job.tokens * STREAM * d)


def _streams(job: Job, through: int) -> int:
    """The residual stream as it enters each layer up to `through`, counted from 0."""
    return (through + 1) * job.tokens * STREAM * job.student.hidden_size


def _own(job: Job, layer: int) -> int:
    """What a layer keeps beside the stream that enters it, but for weights."""
    mixers = job.student.mixer_types or []
    return job.tokens * activations.kept_by_layer(job.student, mixers[layer], job.numbers, tiled=job.tiled)


def _waiting(job: Job, layer: int) -> int:
    """What of that waits for the layer's backward and is not made again there."""
    if not job.checkpointing:
        return _own(job, layer)
    attends = job.checkpointing == "selective" and layer in job.student.mla_layers
    return job.tokens * activations.kept_by_attention(job.student, job.numbers) if attends else 0


def _own_weights(job: Job, layer: int) -> int:
    """Copies of a layer's weights that its backward reads."""
    if job.half:
        return 2 * parameter_counts(job.student).matrices[layer]
    # The up-projection is turned for its products, whatever the type.
    return WIDE * up_projection(job.student) if (job.student.mixer_types or [])[layer] == "mla" else 0


def _kept_weights(job: Job, layer: int) -> int:
    """What of a layer's copies waits for its backward: none that is made again with the layer, or with a tile."""
    if job.checkpointing:
        return 0
    mlp = 3 * job.student.hidden_size * job.student.intermediate_size
    return _own_weights(job, layer) - (2 * mlp if job.half and job.tiled else 0)


def _layer_backward(job: Job, layer: int) -> Phase:
    """The layer's own tensors are there, kept or made again; of those before it what waits for their backward."""
    before = range(layer)
    kept = _streams(job, layer) + _rotation(job) + sum(_waiting(job, i) for i in before)
    copies = sum(_kept_weights(job, i) for i in before) + _own_weights(job, layer)
    own, room = _fullest(job, layer)
    done = len(job.trainable.layers) - layer
    return _phase(job, "backward", done=done, weight_copies=copies, activations=kept + own, room=room)


def _fullest(job: Job, layer: int) -> tuple[int, int]:
    """What a layer keeps, and the room of its backward, where their sum is largest: in the MLP or in the mixer."""
    config, numbers, tokens = job.student, job.numbers, job.tokens
    mixer = (config.mixer_types or [])[layer]
    own, gone = _own(job, layer), tokens * activations.second_half(config, numbers, tiled=job.tiled)
    if job.tiled:
        # A tile at a time; and the gradient of every tile's input, then all of them joined.
        mlp = job.tile_tokens * activations.tile_room(config, numbers)
        mlp += tokens * 2 * numbers.size * config.hidden_size
    else:
        mlp = tokens * activations.mlp_backward_room(config, numbers)
    mixing = tokens * activations.mixer_backward_room(config, mixer, numbers)
    weight = 0 if job.half else WIDE * config.hidden_size * config.intermediate_size
    return max((own, mlp + weight), (own - gone, mixing + weight), key=sum)


def _rotation(job: Job) -> int:
    """cos and sin of every position, made once for all MLA layers."""
    return 2 * STREAM * job.length * job.student.qk_rope_head_dim if job.student.mla_layers else 0


def _student_room(job: Job) -> int:
    """Of a layer's forward where it keeps nothing; what it keeps is counted elsewhere."""
    if not job.checkpointing:
        return 0
    rooms = [activations.student_forward_room(job.student, m, job.numbers) for m in set(job.student.mixer_types or ())]
    mlp = job.tile_tokens * activations.mlp_forward_room(job.student, job.numbers.size)
    return max(max(job.tokens * mixer, job.tokens * beside + mlp) for mixer, beside in rooms)


def _teacher_room(job: Job) -> int:
    attention, beside = activations.teacher_forward_room(job.teacher, job.numbers.size)
    mlp = job.tile_tokens * activations.mlp_forward_room(job.teacher, job.numbers.size)
    return max(job.tokens * attention, job.tokens * beside + mlp)


# ---------------------------------------------------------------- losses


def _head(job: Job) -> int:
    """Elements of the head, 0 where it is frozen."""
    return job.student.vocab_size * job.student.hidden_size if job.trainable.head else 0


def loss_room(job: Job) -> int:
    """Room of linear_kl or linear_cross_entropy, the gradients that it makes in its forward with it."""
    config, e, chunk = job.student, job.numbers.size, min(job.chunk, job.tokens)
    models = 1 if job.teacher is None else 2
    logits = (4 * models + (2 if job.half else 0)) * chunk * config.vocab_size
    copy = 2 * config.vocab_size * config.hidden_size if job.half else 0
    return logits + copy + WIDE * _head(job) + e * job.tokens * config.hidden_size


# ---------------------------------------------------------------- ild: a layer at a time


def _alignment(job: Job) -> Iterator[Phase]:
    """Teacher's states entered, mixed and leaving, and one layer of the student on the first of them."""
    d, tokens = job.student.hidden_size, job.tokens
    state = tokens * job.numbers.size * d
    last = len(job.trainable.layers) - 1
    yield _phase(job, "teacher forward", done=last, teacher=state + _teacher_room(job))

    def of(layer: int) -> Phase:
        own, room = _fullest(job, layer)
        differences = 2 * STREAM * tokens * d
        entered = STREAM * tokens * d
        return _phase(
            job, "backward", done=layer + 1, weight_copies=_own_weights(job, layer),
            activations=entered + own + _rotation(job), room=room, loss=differences, teacher=3 * state,
        )  # fmt: skip

    yield max((of(layer) for layer in range(last + 1)), key=lambda phase: phase.total)


def _step(job: Job) -> Phase:
    """One kernel writes where it reads; on a CPU the root of a second moment and a quotient of it, tensor by tensor."""
    config = job.student
    largest = config.hidden_size * max(config.vocab_size if job.kind != "ild" else 0, config.intermediate_size)
    return _phase(job, "optimiser step", done=None, room=0 if job.cuda else 2 * WIDE * largest)
