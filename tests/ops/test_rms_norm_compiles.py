"""The Triton kernels of rms_norm, compiled for sm_90 just as the op launches them."""

import pytest
import torch

from hylo_ops import rms_norm
from hylo_ops.common.triton_rows import config
from hylo_ops.rms_norm import triton as backend
from hylo_ops.rms_norm import triton_bwd
from tests.dry_driver import SHARED_BYTES, compiling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# D, rows, dtypes of x, residual, weight and y. Another kernel is compiled where a number is 1 or no multiple of 16.
CASES = [
    (1, 1, BF16, None, BF16, BF16),
    (128, 17, BF16, None, BF16, BF16),
    (333, 16, FP16, FP16, FP32, FP16),
    (2048, 16, BF16, FP32, FP32, BF16),
    (2048, 16, FP32, None, FP32, BF16),
    (3072, 16, BF16, BF16, BF16, BF16),
    (4096, 16, BF16, FP32, FP32, BF16),
    (2048, 16, FP32, FP32, FP32, FP32),
    (64, 16, FP32, FP32, FP32, FP32),
    (8192, 3, BF16, FP32, FP32, BF16),
    (8192, 16, FP32, FP32, FP32, FP32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part).removeprefix("torch.") for part in case))
def test_forward_and_backward(case):
    D, rows, of_x, of_residual, of_weight, of_y = case
    x, weight = torch.empty(rows, D, dtype=of_x), torch.empty(D, dtype=of_weight)
    residual = None if of_residual is None else torch.empty(rows, D, dtype=of_residual)
    total, dy = x if residual is None else residual, torch.empty(rows, D, dtype=of_y)
    with compiling() as launched:
        backend.forward(x, weight, residual, 1e-5, of_y)
        backend.backward(dy, residual, total, weight, torch.empty(rows), of_x)
    assert [kernel.name.removeprefix("rms_norm_") for kernel in launched] == ["fwd_kernel_y", "bwd_kernel_dx"]
    for kernel in launched:
        assert kernel.shared <= SHARED_BYTES, kernel
        assert kernel.stack == 0, kernel
    # All programs of the backward are there at once, as docs/rms_norm.md has it.
    num_warps = config(D, triton_bwd._ELEMENTS, triton_bwd._MOST_WARPS).num_warps
    programs = max(1, triton_bwd._WARPS // num_warps)
    assert programs * num_warps * 32 * -(-launched[1].registers // 8) * 8 <= 65536, launched[1]
    assert programs * (launched[1].shared + 1024) <= 228 * 1024, launched[1]


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        rms_norm(torch.empty(2, 16), torch.empty(16), eps=1e-5, backend="triton")
