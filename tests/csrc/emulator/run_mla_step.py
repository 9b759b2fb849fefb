"""Runs every case on CPU tensors and the emulated driver; prints the verdicts as JSON."""

from collections.abc import Callable
from typing import Any

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.fused import cuda_mla
from hylo_ops.testing import DTYPE_NAMES
from tests.csrc.emulator import run_mla_absorb
from tests.csrc.emulator.build import kernel_name
from tests.csrc.emulator.verdicts import report, spec_asked, torch_that_fills
from tests.ops.mla_step_cases import EMULATED, Case, arguments, run_and_check

CPU = 1  # DLPack's number


def specs() -> list[Spec]:
    """Of the kernels that the cases ask for, the attention's included."""
    return list(dict.fromkeys(spec for case in EMULATED for spec in specs_of(case)))


def specs_of(case: Case) -> list[Spec]:
    """Of the attention, which is looked for first, and of what stands around it."""
    x = case.inputs("cpu")
    attention = spec_asked(case.name, lambda find: step(find, find).why_not(arguments(x), x["key_scale"]))
    return [attention, cuda_mla.spec(DTYPE_NAMES[case.dtype], case.nope, case.R)]


def step(find: Callable[..., Any], find_attention: Callable[..., Any]) -> Any:
    """For CPU tensors, with kernels that `find` gives for a spec and a name, and for the attention's."""

    def load(device: int, dtype: str, nope: int, R: int, values: bool) -> Any:
        return find(cuda_mla.spec(dtype, nope, R), cuda_mla.KERNELS[values])

    attention = run_mla_absorb.native(find_attention)
    return cubin.native().MlaStep(torch_that_fills(), load, attention, device_type=CPU)


def main() -> None:
    def find(spec: Spec, kernel: str) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0)

    def find_attention(spec: Spec, shared_bytes: int, max_cluster: int) -> Any:
        name = run_mla_absorb.cuda.KERNEL
        return cubin.native().Kernel(kernel_name(spec).encode(), name, 0, shared_bytes, max_cluster)

    emulated = step(find, find_attention)
    cuda_mla.direct = lambda: emulated.direct
    report(EMULATED, run_and_check)


if __name__ == "__main__":
    main()
