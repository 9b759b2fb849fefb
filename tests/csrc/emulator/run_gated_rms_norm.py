"""Runs every case through `cuda.forward` on CPU tensors and the emulated driver; prints each one's verdict as JSON."""

import json
from typing import Any

import torch

from hylo_ops import cubin
from hylo_ops.gated_rms_norm import cuda
from tests.csrc.emulator.build import kernel_name
from tests.csrc.gated_rms_norm_cases import CASES, Case, run_and_check


def main() -> None:
    def load(spec: cubin.Spec, kernel: str, device: int, *, source: str | None = None) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0)

    cubin.load = load
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.use_deterministic_algorithms(True)  # with it, new tensors are filled with NaN
    print(json.dumps({case.name: verdict(case) for case in CASES}))


def verdict(case: Case) -> str:
    """What is wrong, or nothing."""
    try:
        run_and_check(case, "cpu", cuda.forward)
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
