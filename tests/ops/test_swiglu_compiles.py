"""The Triton kernels of swiglu, compiled for sm_90 just as the op launches them."""

import pytest
import torch

from hylo_ops import swiglu
from hylo_ops.swiglu import triton as backend
from tests.dry_driver import compiling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# N, rows; another kernel is compiled where a number is 1 or no multiple of 16
CASES = [(1, 1, BF16), (333, 17, FP16), (8192, 16, BF16), (9728, 16, BF16), (8192, 16, FP32)]


@pytest.mark.parametrize(("N", "rows", "dtype"), CASES)
def test_forward_and_backward(N, rows, dtype):
    gate_up = torch.empty(rows, 2 * N, dtype=dtype)
    with compiling() as launched:
        backend.forward(gate_up)
        backend.backward([torch.empty(rows, N, dtype=dtype)], gate_up)
    assert [kernel.name.removeprefix("swiglu_") for kernel in launched] == ["fwd_kernel_y", "bwd_kernel_dgate_up"]
    assert all(kernel.stack == 0 for kernel in launched), launched
    if N % 16 == 0:  # and accesses of 16 bytes
        assert all(kernel.registers <= 64 for kernel in launched), launched


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: gate_up is on cpu, not on a CUDA device"):
        swiglu(torch.empty(2, 16), backend="triton")
