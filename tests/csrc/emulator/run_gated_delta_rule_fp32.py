"""Runs every case through the chunked fp32 kernels on CPU tensors and the emulated driver; prints verdicts as JSON."""

from hylo_ops.gated_delta_rule import cuda_chunk_fp32
from tests.csrc.emulator.verdicts import emulate_chunked, report
from tests.ops.gated_delta_rule_fp32_cases import CASES, run_and_check

if __name__ == "__main__":
    emulate_chunked(cuda_chunk_fp32)
    report(CASES, run_and_check)
