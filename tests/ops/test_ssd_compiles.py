"""The Triton kernels of ssd, compiled for sm_90 just as the op launches them for the published models."""

import pytest
import torch

from hylo_ops import chunk_ssd
from hylo_ops.ssd import triton as backend
from tests.dry_driver import SHARED_BYTES, compiling

BF16, FP32 = torch.bfloat16, torch.float32
FORWARD = ["kernel_states", "kernel_pass", "kernel_collect"]
BACKWARD = ["kernel_states", "kernel_pass"] * 2 + ["kernel_collect"] * 3 + ["bwd_kernel_gates", "bwd_kernel_vectors"]
HYLO, MAMBA2 = (8, 2, 2, 8), (8, 8, 1, 1)  # heads of dt, x, b and c
OPTIONS = True, (0.0, 1.0), False


def tensors(V, K, dtype, heads, T=128):
    """The op's tensors up to initial_state: dtypes, widths and alignment are those of a model, the rest is small."""
    H, *others = heads
    x, b, c = (torch.empty(1, T, n, size, dtype=dtype) for n, size in zip(others, (V, K, K), strict=True))
    vector = torch.empty(H)
    return x, torch.empty(1, T, H, dtype=dtype), vector, b, c, vector, vector, torch.empty(1, H, V, K)


def compile_both_ways(inputs, cu_seqlens=None):
    x, dt = inputs[:2]
    grads = [x.new_empty(*dt.shape, x.shape[3]), torch.empty(1, dt.shape[2], x.shape[3], inputs[3].shape[3])]
    with compiling() as launched:
        backend.chunk_forward(*inputs, cu_seqlens, *OPTIONS)
        backend.chunk_backward(grads, *inputs, cu_seqlens, *OPTIONS)
    assert [kernel.name.removeprefix("ssd_") for kernel in launched] == FORWARD + BACKWARD
    assert all(kernel.shared <= SHARED_BYTES for kernel in launched), launched
    return launched


@pytest.mark.parametrize(("V", "K", "heads"), [(64, 128, MAMBA2), (128, 128, HYLO)])
def test_published_models(V, K, heads):
    for kernel in compile_both_ways(tensors(V, K, BF16, heads)):
        assert not kernel.stack, kernel


def test_one_token_packed_without_a_state():
    """Triton compiles another kernel for an argument that is None, 1 or no multiple of 16."""
    *inputs, _ = tensors(16, 16, BF16, HYLO, T=1)
    compile_both_ways((*inputs[:5], None, None, None), torch.tensor([0, 1], dtype=torch.int32))


@pytest.mark.parametrize("state_dtype", [BF16, FP32])
def test_decode(state_dtype):
    *inputs, state = tensors(64, 128, BF16, MAMBA2, T=1)
    with compiling() as launched:
        backend.recurrent_forward(*inputs[:5], state.to(state_dtype), *inputs[5:], None, True, None)
    assert [(kernel.name, kernel.stack) for kernel in launched] == [("ssd_fwd_kernel_step", 0)]


def test_without_a_gpu_it_says_so():
    x, dt, a, b, c, d, dt_bias, state = tensors(16, 16, FP32, HYLO)
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        chunk_ssd(x, dt, a, b, c, d=d, dt_bias=dt_bias, initial_state=state, backend="triton")
