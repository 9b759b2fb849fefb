"""What the scripts have in common that run cases on CPU tensors and the emulated driver, each in its own process."""

import json
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from hylo_ops import cubin
from hylo_ops.common import chunk_inputs
from tests.csrc.emulator.build import kernel_name

NO_KERNEL = "there is no kernel yet"


def report(cases: Iterable[Any], run_and_check: Callable[[Any, str], object]) -> None:
    """Prints what is wrong with each case, or nothing, as JSON."""
    torch.use_deterministic_algorithms(True)  # with it, new tensors are filled with NaN
    print(json.dumps({case.name: _verdict(case, run_and_check) for case in cases}))


def spec_asked(name: str, ask: Callable[[Callable[..., str]], object]) -> cubin.Spec:
    """Of the kernel that a case looks for. `ask(find)`: why what has its kernels from `find` refuses the case."""
    asked: list[cubin.Spec] = []

    def find(spec: cubin.Spec, *_: Any) -> str:
        asked.append(spec)
        return NO_KERNEL

    answer = ask(find)
    assert answer == NO_KERNEL, (name, answer)
    return asked[0]


def torch_that_fills() -> ModuleType:
    """torch without the allocation that leaves memory as it is whatever `report` asks for."""
    module = ModuleType("torch")
    vars(module).update(vars(torch), _C=None)
    return module


def emulate_chunked(module: ModuleType) -> None:
    """Has the launches of a module's chunked kernels go to the emulated driver."""

    def load(spec: cubin.Spec, kernel: str, device: int, *, shared_bytes: int, source: str | None) -> Any:
        return cubin.native().Kernel(kernel_name(spec).encode(), kernel, 0, shared_bytes)

    cubin.load = load
    module._compile = lambda *_: None
    chunk_inputs.stream = lambda device: 0


def _verdict(case: Any, run_and_check: Callable[[Any, str], object]) -> str:
    try:
        run_and_check(case, "cpu")
    except (AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""
