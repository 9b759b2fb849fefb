"""The Triton kernel of sample_tokens, compiled for sm_90 just as the op launches it."""

import pytest
import torch

from hylo_ops import sample_tokens
from hylo_ops.sampling import triton as backend
from tests.dry_driver import compiling

CUTS = [(0.0, None, None), (0.7, None, None), (0.7, 50, None), (0.7, None, 0.9), (0.7, 500, 0.9), (0.7, 50, 0.9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("V", "cuts"), [*((128256, cuts) for cuts in CUTS), *((V, CUTS[-1]) for V in (50, 1 << 21))])
def test_forward(V, cuts, dtype):
    with compiling() as launched:
        backend.forward(torch.empty(2, V + 8, dtype=dtype)[:, :V], torch.empty(2, 63), *cuts)
    assert [kernel.name for kernel in launched] == ["sampling_kernel_token"]
    assert launched[0].stack <= 160, launched  # numbers of a thread: a few, of 1024 lanes that are held some more
    assert launched[0].registers <= 128, launched  # 512 threads


def test_without_a_gpu_it_says_so():
    with pytest.raises(NotImplementedError, match="triton: logits is on cpu, not on a CUDA device"):
        sample_tokens(torch.zeros(2, 16), backend="triton")


def test_what_the_kernel_does_not_take():
    logits = torch.zeros(2, 16, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="triton: logits"):
        sample_tokens(logits, backend="triton")
