"""Runs every case through the public functions on CPU tensors and the emulated driver; prints the verdicts as JSON."""

from collections.abc import Callable
from typing import Any

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.ssd import cuda_mamba2, cuda_recurrent
from tests.csrc.emulator.build import kernel_name
from tests.csrc.emulator.verdicts import report, spec_asked, torch_that_fills
from tests.ops.ssd_step_cases import CASES, MAMBA2_CASES, MANY, Case, Mamba2Case, run_and_check

CPU = 1  # DLPack's number
ALL = [*CASES, *MANY, *MAMBA2_CASES]


def specs() -> list[Spec]:
    """Of the kernels that the cases ask for."""
    return list(dict.fromkeys(spec_of(case, case.inputs("cpu")) for case in ALL))


def spec_of(case: Case, x: dict[str, Any]) -> Spec:
    """Of the kernel that a case asks for with these inputs."""

    def why_not(find: Callable[..., Any]) -> object:
        step, mamba2 = natives(find)
        if isinstance(case, Mamba2Case):
            return mamba2.why_not(case.tensors(x), (x["d_state"], x["x_heads"], x["b_heads"]))
        return step.why_not(case.tensors(x))

    return spec_asked(case.name, why_not)


def natives(find: Callable[..., Any]) -> tuple[Any, Any]:
    """Both steps for CPU tensors, with kernels that `find` gives for a spec, a name and limits."""

    def load(device: int, *kind: Any) -> Any:
        return find(cuda_recurrent.spec(*kind), cuda_recurrent.KERNEL, 0, 1)

    def load_mamba2(device: int, *kind: Any) -> Any:
        *of_spec, shared_bytes, max_cluster = kind
        return find(cuda_mamba2.spec(*of_spec), cuda_mamba2.KERNEL, shared_bytes, max_cluster)

    native = cubin.native()
    torch = torch_that_fills()
    return native.SsdStep(torch, load, device_type=CPU), native.Mamba2Step(torch, load_mamba2, device_type=CPU)


def main() -> None:
    def find(spec: Spec, kernel: str, shared_bytes: int, max_cluster: int) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0, shared_bytes, max_cluster)

    step, mamba2 = natives(find)
    cuda_recurrent.direct = lambda: step.direct
    cuda_mamba2.direct = lambda: mamba2.direct
    report(ALL, run_and_check)


if __name__ == "__main__":
    main()
