"""Runs every case through ssd's plain kernels on CPU tensors and the emulated driver; prints verdicts as JSON."""

from hylo_ops.ssd import cuda_plain
from tests.csrc.emulator.verdicts import emulate_chunked, report
from tests.ops.ssd_plain_cases import CASES, run_and_check

if __name__ == "__main__":
    emulate_chunked(cuda_plain)
    report(CASES, run_and_check)
