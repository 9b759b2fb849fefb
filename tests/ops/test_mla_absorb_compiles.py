"""The Triton kernel of mla_absorb, compiled for sm_90 just as the op launches it for the published models."""

import pytest
import torch

from hylo_ops import fp8_row_bytes, fp8_row_parts, mla_absorb
from hylo_ops.mla_absorb import triton as backend
from tests.dry_driver import SHARED_BYTES, compiling

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# H, R, E, dtype, page, heads of the scales; bytes of stack a thread: 0, or what the loop over tiles does not touch.
CASES = [
    (32, 128, 32, BF16, 16, 8, 0),
    (24, 128, 64, FP16, None, None, 0),
    (16, 256, 64, BF16, 64, None, 0),
    (16, 512, 64, BF16, 64, None, 0),
    (32, 128, 32, FP32, 64, None, 64),
]
# The same over rows in fp8, whose loop does touch it.
CASES_FP8 = [
    (32, 128, 32, BF16, 64, None, 0),
    (24, 128, 64, FP16, None, None, 0),
    (16, 64, 64, BF16, 64, None, 0),
    (32, 128, 32, BF16, 16, 8, 128),
    (16, 256, 64, BF16, 64, None, 0),
    (32, 256, 32, BF16, 64, None, 32),
    (16, 512, 64, BF16, 64, None, 192),
    (128, 512, 64, BF16, 64, None, 200),
]


def tensors(H, R, E, dtype, page, HK, T=1, fp8=False):
    """Widths, dtypes and alignment are those of a model, the rest is small; long enough to be cut."""
    row, stored = (fp8_row_bytes(R, E, HK or 0), torch.uint8) if fp8 else (R + E + (HK or 0), dtype)
    lengths = torch.zeros(2, dtype=torch.int32)
    if page is None:
        cache, table = torch.empty(2, 2048, row, dtype=stored), None
    else:
        cache, table = torch.empty(4, page, row, dtype=stored), torch.zeros(2, 2048 // page, dtype=torch.int32)
    q, rope = torch.empty(2, T, H, R, dtype=dtype), torch.empty(2, T, H, E, dtype=dtype)
    behind = fp8_row_parts(cache, latent_rank=R, dtype=dtype)[2][..., E:] if fp8 else cache[..., R + E :]
    return q, rope, cache, lengths, None, table, None if HK is None else behind[..., :HK]


@pytest.mark.parametrize(
    ("H", "R", "E", "dtype", "page", "HK", "stack", "fp8"),
    [*((*case, False) for case in CASES), *((*case, True) for case in CASES_FP8)],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_decode(H, R, E, dtype, page, HK, stack, fp8):
    inputs = tensors(H, R, E, dtype, page, HK, fp8=fp8)
    with compiling() as launched:
        backend.forward(*inputs, 1.0, True, False)
    (kernel,) = launched
    assert kernel.name == "mla_absorb_fwd_kernel_decode"
    assert kernel.shared <= SHARED_BYTES, kernel
    assert kernel.stack <= stack, kernel


def test_one_kernel_for_all_batches():
    """Another batch, length of the cache or cut of the work costs no compilation."""
    q, rope, cache, lengths, _, table, _ = tensors(4, 16, 0, BF16, 32, None)
    with compiling() as launched:
        for B, pages in ((1, 64), (1, 1000), (2, 64), (16, 33)):
            x = (q[:1].expand(B, -1, -1, -1), rope[:1].expand(B, -1, -1, -1), cache, lengths[:1].repeat(B), None)
            backend.forward(*x, table[:1, :1].repeat(B, pages), None, 1.0, True, False)
    assert len(launched) == 4
    assert len({id(kernel) for kernel in launched}) == 1


def test_without_a_gpu_it_says_so():
    q, rope, cache, lengths, *_ = tensors(4, 16, 0, FP32, None, None)
    with pytest.raises(NotImplementedError, match="triton: q_nope is on cpu, not on a CUDA device"):
        mla_absorb(q, rope, cache, cache_seqlens=lengths, scale=1.0, backend="triton")
