"""Whether Triton can run where a tensor is; importing this imports no Triton."""

import functools
import importlib.util

from torch import Tensor


def why_not_on_device_of(name: str, tensor: Tensor) -> str | None:
    """The reason why Triton's kernels cannot run on the device of a tensor, which messages call `name`, or None."""
    if not _has_triton():
        return "triton is not installed"
    if not tensor.is_cuda and not _interpreting():
        return f"{name} is on {tensor.device}, not on a CUDA device"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _interpreting() -> bool:
    from hylo_ops.common.triton_math import INTERPRETING

    return INTERPRETING
