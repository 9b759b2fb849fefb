"""Runs every case through ssd's plain kernels on CPU tensors and the emulated driver; prints verdicts as JSON."""

import json
from typing import Any

import torch

from hylo_ops import cubin
from hylo_ops.ssd import cuda_inputs, cuda_plain
from tests.csrc.emulator.build import kernel_name
from tests.ops.ssd_plain_cases import CASES, Case, run_and_check


def main() -> None:
    def load(spec: cubin.Spec, kernel: str, device: int, *, shared_bytes: int, source: str | None) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0, shared_bytes)

    cubin.load = load
    cuda_plain._compile = lambda dtype, source: None
    cuda_inputs.stream = lambda device: 0
    torch.use_deterministic_algorithms(True)  # with it, new tensors are filled with NaN
    print(json.dumps({case.name: verdict(case) for case in CASES}))


def verdict(case: Case) -> str:
    """What is wrong, or nothing."""
    try:
        run_and_check(case, "cpu")
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
