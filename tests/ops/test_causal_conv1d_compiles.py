"""The Triton kernels of causal_conv1d, compiled for sm_90 just as the op launches them for a published model."""

import pytest
import torch

from hylo_ops import causal_conv1d
from hylo_ops.causal_conv1d import triton as backend
from hylo_ops.causal_conv1d.triton_fwd import access
from tests.dry_driver import compiling

BF16, FP32 = torch.bfloat16, torch.float32
FORWARD = ["fwd_kernel_y"]
BACKWARD = ["bwd_kernel_dx", "bwd_kernel_dweight"]
# Four programs of four warps fit in a multiprocessor with 128 registers a thread, three with 168.
REGISTERS = {BF16: 128, FP32: 168}


def tensors(dtype, D=2304, T=8, W=4):
    """x, weight, bias and initial_state: dtype and channels are those of a model, the rest is small."""
    return [torch.empty(shape, dtype=dtype) for shape in ((1, T, D), (D, W), (D,), (1, D, W))]


def check(launched, names, registers):
    assert [kernel.name.removeprefix("causal_conv1d_") for kernel in launched] == names
    for kernel in launched:
        assert not kernel.stack, kernel
        assert kernel.registers <= registers, kernel


@pytest.mark.parametrize("dtype", REGISTERS)
def test_training(dtype):
    x, weight, bias, state = tensors(dtype)
    with compiling() as launched:
        backend.forward(x, weight, bias, None, None, "silu")
        backend.backward([x, state], x, weight, bias, None, None, "silu")
    check(launched, FORWARD + BACKWARD, REGISTERS[dtype])


def test_packed_prefill():
    inputs = tensors(BF16)
    with compiling() as launched:
        backend.forward(*inputs, torch.tensor([0, 8], dtype=torch.int32), "silu")
    check(launched, FORWARD, REGISTERS[BF16])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_decode(dtype):
    x, weight, bias, state = tensors(dtype, T=1)
    with compiling() as launched:
        backend.recurrent_forward(x, weight, bias, state, torch.zeros(1, dtype=torch.int32), "silu")
    check(launched, ["fwd_kernel_step"], 64)


def test_elements_of_an_access():
    """Rows of a projection's slice are read in 16 bytes if they start on multiples of it, else in fewer."""
    wide = torch.empty(1, 4, 2304 + 24, dtype=BF16)
    assert access(wide[..., 24:]) == 8
    assert access(wide.float()[..., 24:]) == 4
    assert access(wide[..., 24:], torch.empty(1, 4, 2304 + 2, dtype=BF16)) == 2
    assert access(torch.empty(2, 4, 7, dtype=BF16)) == 1
    assert access(wide.as_strided((1, 4, 16), (3, 16, 1))) == 8  # the stride of one row leads nowhere


def test_without_a_gpu_it_says_so():
    x, weight, *_ = tensors(FP32, D=8)
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        causal_conv1d(x, weight, backend="triton")
