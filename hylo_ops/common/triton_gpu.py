"""What the GPU has that Triton's kernels are to run on."""

import torch
from triton.runtime import driver

from hylo_ops.common.triton_math import INTERPRETING

ROOMY = 227 * 1024  # bytes of shared memory of a Hopper; others have 64 to 163 KiB


def resources(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory that a program can have."""
    if INTERPRETING:
        return 8, ROOMY
    properties = driver.active.utils.get_device_properties(device.index or 0)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def is_nvidia_from(architecture: int) -> bool:
    """Whether the current GPU is NVIDIA's, of this architecture or a later one; 90 is sm_90."""
    if INTERPRETING:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= architecture
