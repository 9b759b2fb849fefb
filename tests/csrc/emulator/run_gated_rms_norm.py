"""Runs every case through the CUDA backend on CPU tensors and the emulated driver; prints their verdicts as JSON."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.gated_rms_norm import cuda
from tests.csrc.emulator.build import kernel_name
from tests.csrc.gated_rms_norm_cases import CASES, EMULATED_BACKWARD_CASES, Case, run_and_check, run_and_check_backward


def main() -> None:
    def load(spec: cubin.Spec, kernel: str, device: int, *, source: str | None = None) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0)

    cubin.load = load
    cuda._multiprocessors = lambda device: 1
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.use_deterministic_algorithms(True)  # with it, new tensors are filled with NaN
    forward = {case.name: verdict(case, run_and_check, cuda.forward) for case in CASES}
    backward = {case.name: verdict(case, run_and_check_backward, cuda.backward) for case in EMULATED_BACKWARD_CASES}
    print(json.dumps({"forward": forward, "backward": backward}))


def verdict(case: Case, check: Callable[..., Any], function: Callable[..., Tensor | list[Tensor]]) -> str:
    """What is wrong, or nothing."""
    try:
        check(case, "cpu", function)
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
