"""Runs every case on CPU tensors and the emulated driver; prints the verdicts as JSON."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.mla_absorb import cuda
from tests.csrc.emulator.build import kernel_name
from tests.csrc.emulator.verdicts import report, torch_that_fills
from tests.ops.mla_absorb_cuda_cases import EMULATED, NAMES, SCALE, Case, run_and_check

CPU = 1  # DLPack's number


def specs() -> list[Spec]:
    """Of the kernels that the cases ask for."""
    return list(dict.fromkeys(spec_of(case) for case in EMULATED))


def spec_of(case: Case) -> Spec:
    asked: list[Spec] = []

    def note(spec: Spec, *_: Any) -> str:
        asked.append(spec)
        return "there is no kernel yet"

    x = case.inputs("cpu")
    answer = native(note).why_not(tuple(x[name] for name in NAMES))
    assert answer == "there is no kernel yet", (case.name, answer)
    return asked[0]


def native(find: Callable[..., Any]) -> Any:
    """For CPU tensors, with kernels that `find` gives for a spec and limits."""

    def load(device: int, *kind: Any) -> Any:
        *of_spec, shared_bytes, max_cluster = kind
        return find(cuda.spec(*of_spec), shared_bytes, max_cluster)

    def tickets(count: int, device: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)

    # Every other call, as in a graph, works on memory of its own, which is full of NaN.
    capturing = itertools.cycle((True, False))
    return cubin.native().MlaAbsorb(torch_that_fills(), load, tickets, partial(next, capturing), device_type=CPU)


def attend(emulated: Any, x: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    spread = None if case.fixed_split else case.spread
    results = emulated.run(tuple(x[name] for name in NAMES), SCALE, case.causal, case.fixed_split, spread)
    if isinstance(results, str):
        raise RuntimeError(results)
    return results


def main() -> None:
    def find(spec: Spec, shared_bytes: int, max_cluster: int) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), cuda.KERNEL, 0, shared_bytes, max_cluster)

    emulated = native(find)
    report(EMULATED, partial(run_and_check, attend=partial(attend, emulated)))


if __name__ == "__main__":
    main()
