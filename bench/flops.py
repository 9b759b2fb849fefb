"""FLOP that a model's tokens cannot do without, however its kernels work (docs/long-context.md); a multiply and an add
are 2."""

from dataclasses import dataclass
from typing import Any

from hylo.memory import Job, parameter_counts

# Dense bf16 FLOP a second by NVIDIA's data sheets, by the name that the driver gives.
PEAK_BF16 = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


@dataclass(frozen=True)
class StepFlop:
    """Of one training step.

    Args:
        student: forward and backward.
        teacher: forward.
        again: what of the forward is run a second time to spare memory.
    """

    student: float
    teacher: float
    again: float

    @property
    def model(self) -> float:
        """What the step computes, however little memory there is."""
        return self.student + self.teacher


def forward_flop(config: Any, length: int) -> float:
    """One sequence through all layers: products with weights, causal attention over expanded keys, recurrences token by
    token (6 K V a head for the delta rule, 4 K V for Mamba2)."""
    attention = recurrence = 0
    for mixer in getattr(config, "mixer_types", None) or ["attention"] * config.num_hidden_layers:
        heads = config.num_attention_heads
        if mixer == "attention":
            attention += 2 * heads * config.head_dim
        elif mixer == "mla":
            attention += _mla_attention(config)
        elif mixer == "gated_deltanet":
            recurrence += 6 * config.linear_num_heads * config.linear_key_head_dim * config.linear_value_head_dim
        else:
            recurrence += 4 * heads * config.head_dim**2
    weights = sum(parameter_counts(config).matrices)
    return 2.0 * weights * length + 1.0 * attention * length**2 + 1.0 * recurrence * length


def step_flop(job: Job) -> StepFlop:
    """A whole model's step, "kl" or "ce", of one micro-batch. A backward is two forwards."""
    forward = job.batch * forward_flop(job.student, job.length)
    head = 2.0 * job.tokens * job.student.vocab_size
    teacher = 0.0
    if job.teacher is not None:
        teacher = job.batch * forward_flop(job.teacher, job.length) + head * job.teacher.hidden_size
    student = 3 * (forward + head * job.student.hidden_size)
    return StepFlop(student=student, teacher=teacher, again=_again(job, forward))


def _again(job: Job, forward: float) -> float:
    """A layer, or a tile, ends with the MLP's last product, and is run again up to the last tensor that it keeps: the
    product's factors. Of a layer in tiles that is the last tile's input. Attention is kept where that is selective."""
    product = 2.0 * job.student.hidden_size * job.student.intermediate_size * job.student.num_hidden_layers
    tiles = 2 * product * job.tokens if job.tiled else 0.0
    if not job.checkpointing:
        return tiles
    left_out = product * job.tokens
    if job.tile is not None and job.tiled:
        left_out = 3 * product * ((job.tokens - 1) % job.tile + 1)
    if job.checkpointing == "selective":
        attention = len(job.student.mla_layers) * _mla_attention(job.student)
        left_out += 1.0 * job.batch * attention * job.length**2
    return forward - left_out + tiles


def _mla_attention(config: Any) -> int:
    """Of an MLA layer, for each token and each token of the sequence."""
    heads: int = config.num_attention_heads
    return heads * (config.qk_head_dim + config.v_head_dim)
