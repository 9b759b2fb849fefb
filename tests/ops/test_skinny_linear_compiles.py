"""The Triton kernel of skinny_linear, compiled for sm_90 just as the op launches it."""

import pytest
import torch

from hylo_ops import skinny_linear
from hylo_ops.common import triton_launch
from hylo_ops.skinny_linear import triton as backend
from hylo_ops.skinny_linear.triton_fwd import _PROGRAMS
from tests.dry_driver import compiling

BF16, FP16 = torch.bfloat16, torch.float16
# Rows, N, K, kind. Another kernel is compiled where N is 1 or no multiple of 16.
CASES = [
    (1, 9232, 2048, "plain", BF16),
    (1, 128256, 2048, "plain", BF16),
    (16, 2048, 3072, "add", FP16),
    (16, 8192, 2048, "swiglu", BF16),
    (17, 333, 48, "plain", BF16),
    (32, 3072, 8192, "add", BF16),
    (32, 8192, 3072, "swiglu", BF16),
    (64, 9232, 2048, "plain", BF16),
    (64, 128256, 3072, "plain", FP16),
    (64, 2048, 8192, "add", BF16),
    (64, 8192, 2048, "swiglu", BF16),
    (64, 1, 16, "swiglu", BF16),
]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("B", "N", "K", "kind", "dtype"), CASES)
def test_forward(B, N, K, kind, dtype, constant):
    x, weight = torch.empty(B, K, dtype=dtype), torch.empty(2 * N if kind == "swiglu" else N, K, dtype=dtype)
    residual = torch.empty(B, N, dtype=dtype) if kind == "add" else None
    with compiling() as launched:
        backend.forward(x, weight, residual, kind == "swiglu", constant)
    (kernel,) = launched
    assert kernel.name == "skinny_linear_fwd_kernel_y"
    assert kernel.stack == 0, kernel
    # Programs that are meant to share a multiprocessor do.
    assert _PROGRAMS * 128 * -(-kernel.registers // 8) * 8 <= 65536, kernel
    assert _PROGRAMS * (kernel.shared + 1024) <= 228 * 1024, kernel


def test_weights_come_16_bytes_at_a_time_and_after_the_wait_unless_constant():
    x, weight = torch.empty(5, 2048, dtype=BF16), torch.empty(2064, 2048, dtype=BF16)
    texts = []
    for constant in (False, True):
        with compiling():
            triton_launch._compiled.clear()
            backend.forward(x, weight, None, False, constant)
            (compiled,) = triton_launch._compiled.values()
        assert compiled.metadata.launch_pdl
        texts.append(compiled.asm["ptx"])
    for ptx, constant in zip(texts, (False, True), strict=True):
        start, wait = (ptx.index(f"griddepcontrol.{what}") for what in ("launch_dependents", "wait"))
        assert start < wait < ptx.index("cp.async.cg.shared.global")
        assert "cp.async.ca" not in ptx
        assert "ld.global.b" not in ptx
        assert ("prefetch.global.L2" in ptx[start:wait]) == constant
        assert "prefetch" not in ptx[wait:]


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: x is on cpu, not on a CUDA device"):
        skinny_linear(torch.empty(2, 16), torch.empty(8, 16), backend="triton")
