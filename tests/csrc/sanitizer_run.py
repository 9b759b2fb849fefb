"""Launches every case of the CUDA kernels once, for compute-sanitizer (tests/gpu.sh): few other kernels, no pytest."""

import torch

from hylo_ops.gated_rms_norm import cuda
from tests.csrc.gated_rms_norm_cases import CASES


def main() -> None:
    for case in CASES:
        x, gate, weight = case.inputs("cuda")
        y = cuda.forward(x, gate, weight, case.eps, case.norm_before_gate)
        assert torch.isfinite(y.cpu()).all(), case.name
    print(f"{len(CASES)} cases launched")


if __name__ == "__main__":
    main()
