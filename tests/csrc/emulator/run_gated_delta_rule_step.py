"""Runs every case through the public functions on CPU tensors and the emulated driver; prints the verdicts as JSON."""

from typing import Any

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.gated_delta_rule import cuda_recurrent
from tests.csrc.emulator.build import kernel_name
from tests.csrc.emulator.verdicts import report, torch_that_fills
from tests.ops.gated_delta_rule_step_cases import CASES, run_and_check

CPU = 1  # DLPack's number


def main() -> None:
    def load(device: int, dtype: str, state: str, K: int, raw: bool, team: int) -> Any:
        types = ("T", dtype), ("S", state)
        spec = Spec("gated_delta_rule", (*types, ("K", K), ("RAW", int(raw)), ("TEAM", team)), "step")
        return cubin.native().Kernel(kernel_name(spec).encode(), cuda_recurrent._KERNEL, 0)

    native = cubin.native().GatedDeltaRuleStep(torch_that_fills(), load, device_type=CPU)
    cuda_recurrent._native_or_none = lambda: native
    report(CASES, run_and_check)


if __name__ == "__main__":
    main()
