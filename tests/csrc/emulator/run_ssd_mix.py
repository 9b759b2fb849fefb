"""Runs every case through the kernel that convolves b and c, on CPU tensors; prints verdicts."""

from hylo_ops.ssd import cuda_chunk
from tests.csrc.emulator.verdicts import emulate_chunked, report
from tests.ops.convolved_ssd_cases import CASES, mix_and_check

if __name__ == "__main__":
    emulate_chunked(cuda_chunk)
    cuda_chunk._multiprocessors = lambda device: 132
    report(CASES, mix_and_check)
