"""What the chunked kernels of the CUDA backend ask of their inputs, whatever the operator, and tell their launchers."""

import torch
from torch import Tensor

from hylo_ops import cubin

CHUNK = 64  # tokens; kChunk of csrc/common/portable.h
MAX_WIDTH = 256  # K
_STEP = 16  # of widths
_ALIGNMENT = 16  # bytes, of what is read at once


def why_not(tensors: dict[str, Tensor], K: int, V: int, initial_state: Tensor | None) -> str | None:
    """The reason why no chunked kernel can take the inputs, or None.

    Args:
        tensors: by name, [B, T, heads, width] on one CUDA device.
    """
    if initial_state is not None and initial_state.dtype == torch.float64:
        return "the state is float64"
    if K % _STEP or not 0 < K <= MAX_WIDTH:
        return f"K is {K}, not a multiple of {_STEP} up to {MAX_WIDTH}"
    if V % _STEP or not V:
        return f"V is {V}, not a multiple of {_STEP}"
    for name, tensor in tensors.items():
        if not _reachable(tensor):
            return f"{name} cannot be read 16 bytes at a time: strides {tensor.stride()} or its start are not aligned"
    return cubin.why_not_device(next(iter(tensors.values())).get_device())


def sequences(B: int, cu_seqlens: Tensor | None) -> int:
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1


def most_chunks(B: int, T: int, cu_seqlens: Tensor | None) -> int:
    """Chunks of all sequences; a bound for packed ones, none of which leaves two unfilled."""
    if not T:
        return 0
    return B * -(-T // CHUNK) if cu_seqlens is None else T // CHUNK + sequences(B, cu_seqlens)


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _reachable(tensor: Tensor) -> bool:
    steps = [step for step, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    aligned = all(step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)
    return tensor.stride(3) == 1 and aligned and tensor.data_ptr() % _ALIGNMENT == 0
