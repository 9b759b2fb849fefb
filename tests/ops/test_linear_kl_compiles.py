"""Every configuration of the Triton kernels of linear_kl, compiled for sm_90 just as the op launches it."""

import pytest
import torch

from hylo_ops.linear_kl import chunked, triton_fwd
from tests.dry_driver import SHARED_BYTES, compiling

BF16, FP32 = torch.bfloat16, torch.float32
# V, dtype of the gradient, teacher, targets, reverse; Triton compiles another kernel where V is 1 or no multiple of 16.
CASES = [
    (128256, BF16, True, False, False),
    (151936, BF16, True, True, True),
    (128256, torch.float16, True, True, False),
    (31, FP32, True, True, False),
    (1, BF16, True, False, True),
    (128256, BF16, False, True, False),
    (50257, FP32, False, True, False),
]


@pytest.mark.parametrize(
    ("V", "dtype", "teacher", "targets", "reverse"), CASES, ids=lambda x: str(x).removeprefix("torch.")
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_and_gradient(V, dtype, teacher, targets, reverse, temperature):
    logits, shares = torch.empty(2, V), torch.empty(2)
    terms = chunked.Terms(
        torch.empty(2, dtype=torch.int64) if targets else None,
        shares if teacher else None,
        shares if targets else None,
        temperature,
        reverse,
    )
    with compiling() as launched:
        triton_fwd.rows(logits, logits if teacher else None, terms, torch.empty(2, V, dtype=dtype))
    assert [kernel.name for kernel in launched] == ["linear_kl_fwd_kernel_loss", "linear_kl_fwd_kernel_gradient"]
    for kernel in launched:
        assert kernel.shared <= SHARED_BYTES, kernel
        assert kernel.stack == 0, kernel
        assert kernel.registers <= 128, kernel  # two programs of 8 warps a multiprocessor, and more
