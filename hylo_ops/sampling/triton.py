"""The Triton backend of sample_tokens: which inputs it takes, and its kernel, imported on first use."""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of

MAX_VOCABULARY = 1 << 21
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.sampling import triton_decode

    with torch.cuda.device_of(logits):
        return triton_decode.forward(logits, uniforms, temperature, top_k, top_p)


def why_not(logits: Tensor, **_: Any) -> str | None:
    """The reason why the kernel cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("logits", logits)) is not None:
        return reason
    if logits.dtype not in _DTYPES:
        return f"logits are {logits.dtype}, not bfloat16, float16 or float32"
    if logits.stride(-1) != 1:
        return f"the last dim of logits is not contiguous: its strides are {logits.stride()}"
    if logits.shape[1] > MAX_VOCABULARY:
        return f"V is {logits.shape[1]}, more than {MAX_VOCABULARY}"
    return None
