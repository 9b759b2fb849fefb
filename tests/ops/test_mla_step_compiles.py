"""The Triton kernels of a decode step, compiled for sm_90 just as the op launches them for the published models."""

from dataclasses import replace

import pytest
import torch

from hylo_ops.fused import triton_mla
from tests.dry_driver import SHARED_BYTES, compiling
from tests.ops.mla_step_cases import FP16, FP32, SCALE, Case, arguments

LENGTHS = (70, 9)
CASES = [
    Case(32, 8, 32, 128, 32, 64, LENGTHS, page=64),
    Case(24, 8, 64, 128, 64, 128, LENGTHS, page=None),
    Case(16, 8, 64, 256, 64, 128, LENGTHS, page=64, scales=8),
    Case(16, 16, 128, 512, 64, 128, LENGTHS, page=64, dtype=FP16, angles=FP32),
    Case(32, 8, 32, 128, 32, 64, LENGTHS, dtype=FP32, angles=FP32),
    Case(4, 2, 16, 16, 0, 16, LENGTHS),
]
NAMES = ["mla_step_fwd_kernel_queries", "mla_absorb_fwd_kernel_decode", "mla_step_fwd_kernel_values"]


def launched_by(case, **changes):
    x = case.inputs("cpu") | changes
    with compiling() as launched:
        triton_mla.forward(*arguments(x), SCALE, x["key_scale"])
    return launched


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_launches_without_spills(case):
    """The attention has its own test. 8 bytes of stack stand beside 48 registers: those are no spills."""
    launched = launched_by(case)
    assert [kernel.name for kernel in launched] == NAMES
    for kernel in (launched[0], launched[2]):
        assert kernel.shared <= SHARED_BYTES, kernel
        assert kernel.stack <= 8, kernel


def test_few_kernels_for_all_batches():
    """Another cache costs no compilation, another batch only where it fills larger tiles of rows."""
    case = replace(CASES[0], page=16)
    found = {
        (lengths, kernel.name, id(kernel))
        for lengths in ((3,), (9, 40), (300, 2), tuple(range(1, 5)))
        for kernel in launched_by(replace(case, lengths=lengths))
        if kernel.name != NAMES[1]
    }
    assert len({kernel for *_, kernel in found}) == 2, found


def test_without_a_gpu_it_says_so():
    x = CASES[0].inputs("cpu")
    reason = triton_mla.why_not(*arguments(x), SCALE, None)
    assert reason == "q_nope is on cpu, not on a CUDA device"
    assert torch.isnan(x["kv_cache"]).any()
