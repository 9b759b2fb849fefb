"""Every configuration of the Triton kernels of gated_delta_rule, compiled for sm_90 just as the op launches it."""

import pytest
import torch

from hylo_ops import chunk_gated_delta_rule
from hylo_ops.gated_delta_rule import triton as backend
from hylo_ops.gated_delta_rule import triton_chunk_fwd
from hylo_ops.testing import DTYPE_NAMES
from tests.dry_driver import SHARED_BYTES, compiling

# Bytes of stack a thread of the chunked forward; the decode kernel has none.
FORWARD_SPILLS = {
    ("bf16", 64): 464,
    ("bf16", 128): 288,
    ("bf16", 256): 288,
    ("fp32", 64): 32,
    ("fp32", 128): 32,
    ("fp32", 256): 192,
}
BACKWARD_SPILLS = {"bf16": 96, "fp32": 512}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def tensors(K, V, dtype, T=64, R=2):
    """q, k, v, g, beta and a state: dtypes, widths and alignment are those of a model, the rest is small.

    R value heads share a query-key head.
    """
    G, H = 4 // R, 4
    q, v = torch.empty(1, T, G, K, dtype=dtype), torch.empty(1, T, H, V, dtype=dtype)
    g = torch.empty(1, T, H)
    return (q, torch.empty_like(q), v, g, torch.empty_like(g)), torch.empty(1, H, K, V)


def check(launched, names, stack):
    assert [kernel.name.removeprefix("gated_delta_rule_") for kernel in launched] == names
    for kernel in launched:
        assert kernel.shared <= SHARED_BYTES, kernel
        assert kernel.stack <= stack, kernel


@pytest.mark.parametrize(("dtype", "K"), FORWARD_SPILLS)
@pytest.mark.parametrize("V", [64, 128])
def test_forward(dtype, K, V):
    inputs, state = tensors(K, V, DTYPES[dtype])
    with compiling() as launched:
        backend.chunk_forward(*inputs, state, None, 1.0, False)
    check(launched, ["fwd_kernel_inverse", "fwd_kernel_state", "fwd_kernel_o"], FORWARD_SPILLS[dtype, K])


@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_forward_of_odd_lengths_without_a_state(T, packed):
    """Triton compiles another kernel for an argument that is None, 1 or no multiple of 16."""
    inputs, _ = tensors(64, 64, torch.bfloat16, T, R=1)
    cu_seqlens = torch.tensor([0, T, T], dtype=torch.int32) if packed else None
    with compiling() as launched:
        backend.chunk_forward(*inputs, None, cu_seqlens, 1.0, False)
    check(launched, ["fwd_kernel_inverse", "fwd_kernel_state", "fwd_kernel_o"], FORWARD_SPILLS["bf16", 64])


@pytest.mark.parametrize(("dtype", "K"), FORWARD_SPILLS)
@pytest.mark.parametrize("V", [64, 128])
def test_decode(dtype, K, V):
    inputs, state = tensors(K, V, DTYPES[dtype], T=1)
    with compiling() as launched:
        backend.recurrent_forward(*inputs, state, 1.0, torch.zeros(1, dtype=torch.int32))
    check(launched, ["fwd_kernel_step"], 0)


class NotLaunched:
    """Stands in for a kernel that is not compiled."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("dtype", BACKWARD_SPILLS)
@pytest.mark.parametrize("K", [64, 128, 256])
@pytest.mark.parametrize(("V", "R"), [(64, 2), (128, 1)])
def test_backward(dtype, K, V, R, monkeypatch):
    """The forward's inverse, which the backward launches again, takes longer to compile than all of its own kernels."""
    monkeypatch.setattr(triton_chunk_fwd, "gated_delta_rule_fwd_kernel_inverse", NotLaunched())
    (q, k, v, g, beta), state = tensors(K, V, DTYPES[dtype], R=R)
    with compiling() as launched:
        backend.chunk_backward([v, state], q, k, v, g, beta, state, None, 1.0, False)
    ours = [kernel for kernel in launched if "_bwd_" in kernel.name]
    names = [f"bwd_kernel_{name}" for name in ("reads", "state", "scores", "qk", "gates")]
    check(ours, names, BACKWARD_SPILLS[dtype])


def test_without_a_gpu_it_says_so():
    inputs, state = tensors(16, 16, torch.float32)
    with pytest.raises(NotImplementedError, match="triton: q is on cpu, not on a CUDA device"):
        chunk_gated_delta_rule(*inputs, initial_state=state, backend="triton")
