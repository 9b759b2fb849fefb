"""The Triton backend of the head's losses: which inputs it takes, and its kernels, imported on first use.

They make a chunk's losses and gradient out of logits; the products are PyTorch's, as in `chunked`.
"""

from typing import Any

import torch
from torch import Tensor

from hylo_ops.common.triton_device import why_not_on_device_of
from hylo_ops.linear_kl import chunked

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def forward(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's forward for inputs that `why_not` lets pass; never synchronises."""
    from hylo_ops.linear_kl import triton_fwd

    with torch.cuda.device_of(hidden):
        return chunked.run(triton_fwd.rows, hidden, *others)


def why_not(hidden: Tensor, teacher_hidden: Tensor | None, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if (reason := why_not_on_device_of("hidden", hidden)) is not None:
        return reason
    for name, tensor in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{name} is {tensor.dtype}, not bfloat16, float16 or float32"
    return None
