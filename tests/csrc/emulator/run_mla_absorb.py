"""Runs every case on CPU tensors and the emulated driver; prints the verdicts as JSON."""

import ctypes
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
from tests.csrc.emulator.verdicts import report, spec_asked, torch_that_fills
from tests.ops.mla_absorb_cuda_cases import EMULATED, GATHERED, NAMES, SCALE, Case, check, run_and_check

CPU = 1  # DLPack's number

# How many clusters run at once, whether whoever waits gives up at the second look, and whether others are let go ahead
# where it matters who comes first.
MANY, FEW = 12, 3  # clusters of the GPU
MODES = {
    "all at once": (MANY, False, False),
    "all at once, others first": (MANY, False, True),
    "one after the other": (1, False, False),
    "some at once": (MANY // 2 - 1, False, False),
    "two at once, others first": (2, False, True),
    "all at once, without patience": (MANY, True, False),
    "all at once, without patience, others first": (MANY, True, True),
}


def specs() -> list[Spec]:
    """Of the kernels that the cases ask for."""
    cases = (*EMULATED, *GATHERED)
    return list(dict.fromkeys(spec_for(case.inputs("cpu"), case.fixed_split, case.name) for case in cases))


def spec_for(x: dict[str, Any], fixed_split: bool, name: str) -> Spec:
    tensors = tuple(x[of] for of in NAMES)
    return spec_asked(name, lambda find: native(find).why_not(tensors, fixed_split))


TICKETS: list[Tensor] = []  # of all launches


def native(find: Callable[..., Any]) -> Any:
    """For CPU tensors, with kernels that `find` gives for a spec and limits."""

    def load(device: int, *kind: Any) -> Any:
        *of_spec, shared_bytes, max_cluster = kind
        return find(cuda.spec(*of_spec), shared_bytes, max_cluster)

    def tickets(count: int, device: int) -> Tensor:
        TICKETS.append(torch.zeros(count, dtype=torch.int32))
        return TICKETS[-1]

    # Every other call, as in a graph, works on memory of its own, which is full of NaN.
    capturing = itertools.cycle((True, False))
    return cubin.native().MlaAbsorb(torch_that_fills(), load, tickets, partial(next, capturing), device_type=CPU)


def attend(emulated: Any, x: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    spread = None if case.fixed_split else case.spread
    results = emulated.run(tuple(x[name] for name in NAMES), SCALE, case.causal, case.fixed_split, spread)
    if isinstance(results, str):
        raise RuntimeError(results)
    assert not any(map(torch.any, TICKETS)), "tickets are left"
    return results


def gather_and_check(case: Case, device: str, emulated: Any) -> None:
    """Whoever waits for whom in vain: the same bits. Launches of another length on the same workspace lie between."""
    x = case.inputs(device)
    shorter = {**x, "cache_seqlens": x["cache_seqlens"] // 2}
    expected: tuple[Tensor, Tensor] | None = None
    for name, mode in MODES.items():
        emulate(MANY, *mode)
        for _ in range(2):  # in both orders of threads
            o, lse = attend(emulated, x, case)
            expected = expected or (o, lse)
            assert torch.equal(o, expected[0]), f"o differs: {name}"
            assert torch.equal(lse, expected[1]), f"lse differs: {name}"
        attend(emulated, shorter, case)
    check(x, case, o, lse)


def emulate(*how: int) -> None:
    ctypes.CDLL("libcuda.so.1").emulate(*map(int, how))


def main() -> None:
    def find(spec: Spec, shared_bytes: int, max_cluster: int) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), cuda.KERNEL, 0, shared_bytes, max_cluster)

    def run(case: Case, device: str) -> None:
        if case in GATHERED:
            return gather_and_check(case, device, many)
        emulate(FEW, 1, False, False)
        return run_and_check(case, device, partial(attend, few))

    # A backend asks once how many clusters there are.
    few, many = native(find), native(find)
    report((*EMULATED, *GATHERED), run)


if __name__ == "__main__":
    main()
