"""Memory of training and inference by formula: what a recipe takes on a GPU before anything is built."""

from hylo.memory.command import memory_command
from hylo.memory.counts import Counts, parameter_counts
from hylo.memory.recipe import stage_job
from hylo.memory.training import Job, Phase, kept_for_backward, peak, phases

__all__ = [
    "Counts",
    "Job",
    "Phase",
    "kept_for_backward",
    "memory_command",
    "parameter_counts",
    "peak",
    "phases",
    "stage_job",
]
