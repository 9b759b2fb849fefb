"""Every configuration of the Triton kernels of gated_rms_norm, compiled for sm_90 just as the op launches it."""

import pytest
import torch

from hylo_ops import gated_rms_norm
from hylo_ops.gated_rms_norm import triton as backend
from tests.dry_driver import SHARED_BYTES, compiling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# V, dtype of x, dtype of the weight, order, B, T, H; Triton compiles another kernel where a number is 1 or no multiple
# of 16.
CASES = [
    (1, BF16, BF16, True, 1, 1, 1),
    (64, BF16, BF16, False, 1, 16, 2),
    (64, FP32, FP32, True, 3, 5, 1),
    (512, BF16, FP32, True, 2, 16, 6),
    (2048, FP16, FP16, False, 1, 16, 1),
    (4096, BF16, FP32, True, 1, 3, 1),
    (16384, FP32, FP32, False, 1, 2, 1),
]


def tensors(V, dtype, weight_dtype, B=1, T=16, H=2):
    x, gate = torch.empty(B, T, H, V, dtype=dtype), torch.empty(B, T, H, V, dtype=dtype)
    return x, gate, torch.empty(H, V, dtype=weight_dtype)


@pytest.mark.parametrize(
    ("V", "dtype", "weight_dtype", "norm_before_gate", "B", "T", "H"),
    CASES,
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_forward_and_backward(V, dtype, weight_dtype, norm_before_gate, B, T, H):
    inputs = tensors(V, dtype, weight_dtype, B, T, H)
    with compiling() as launched:
        backend.forward(*inputs, 1e-5, norm_before_gate)
        backend.backward([inputs[0]], *inputs, 1e-5, norm_before_gate)
    names = ["fwd_kernel_y", *(["bwd_kernel_norm"] if V > 4096 else []), "bwd_kernel_dx"]
    assert [kernel.name.removeprefix("gated_rms_norm_") for kernel in launched] == names
    for kernel in launched:
        assert kernel.shared <= SHARED_BYTES, kernel
        assert kernel.stack == 0, kernel


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        gated_rms_norm(*tensors(16, FP32, FP32), eps=1e-5, norm_before_gate=True, backend="triton")
