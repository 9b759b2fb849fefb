"""Runs every case on CPU tensors and the emulated driver; prints the verdicts as JSON."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.skinny_linear import cuda
from tests.csrc.emulator.build import kernel_name
from tests.csrc.emulator.verdicts import report, spec_asked, torch_that_fills
from tests.csrc.skinny_linear_cases import EMULATED, Case, run_and_check

CPU = 1  # DLPack's number


def specs() -> list[Spec]:
    """Of the kernels that the cases ask for, with a row alone too."""
    kinds = sorted({(case.dtype, B, min(case.channels, 8)) for case in EMULATED for B in (1, case.B)}, key=str)
    asked = (spec_of(Case(8, 64, B, dtype=dtype, channels=channels)) for dtype, B, channels in kinds)
    return list(dict.fromkeys(asked))


def spec_of(case: Case) -> Spec:
    x = case.inputs("cpu")
    inputs = x["x"], x["weight"], x["residual"], case.swiglu, x["norm"], x["conv_weight"], x["conv_state"]
    return spec_asked(case.name, lambda find: native(find).why_not(*inputs))


def native(find: Callable[..., Any]) -> Any:
    """For CPU tensors, with kernels that `find` gives for a spec and limits."""

    def load(device: int, dtype: str, B: int, convolves: bool, shared_bytes: int, max_cluster: int) -> Any:
        return find(cuda.spec(dtype, B, convolves), shared_bytes, max_cluster)

    return cubin.native().SkinnyLinear(torch_that_fills(), load, device_type=CPU)


def multiply(emulated: Any, *inputs: Any) -> Tensor:
    y = emulated.run(*inputs)
    if isinstance(y, str):
        raise RuntimeError(y)
    return y


def main() -> None:
    def find(spec: Spec, shared_bytes: int, max_cluster: int) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), cuda.KERNEL, 0, shared_bytes, max_cluster)

    emulated = native(find)

    def run(case: Case, device: str) -> None:
        run_and_check(case, device, partial(multiply, emulated))

    report(EMULATED, run)


if __name__ == "__main__":
    main()
