"""The Triton kernels of l2_norm, compiled for sm_90 just as the op launches them."""

import pytest
import torch

from hylo_ops import l2_norm
from hylo_ops.l2_norm import triton as backend
from tests.dry_driver import compiling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("K", [1, 16, 100, 256, 512, 8192])
def test_forward_and_backward(K, dtype):
    x = torch.empty(2, 16, 8 * K, dtype=dtype)[..., K : 7 * K].unflatten(-1, (6, K))
    with compiling() as launched:
        backend.forward(x, 1e-6)
        backend.backward([torch.empty(x.shape, dtype=dtype)], [torch.empty(x.shape[:-1])], x, 1e-6)
    assert [kernel.name.removeprefix("l2_norm_") for kernel in launched] == ["fwd_kernel_y", "bwd_kernel_dx"]
    assert all(kernel.stack == 0 and kernel.registers <= 64 for kernel in launched), launched


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        l2_norm(torch.empty(2, 16), backend="triton")
