"""A Triton driver for a machine without a GPU: it compiles what a launcher launches, for sm_90, and runs nothing.

So a test compiles every kernel just as the op launches it, and sees the shared memory, registers and spills it takes.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

SHARED_BYTES = 227 * 1024  # of one program on an H100 or H200
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """A kernel and what it takes: bytes of shared memory, registers a thread, bytes of stack a thread (spills)."""

    name: str
    shared: int
    registers: int
    stack: int


class _DryDriver(DriverBase):
    """What Triton calls a kernel's function is here the record of what it takes, and a launch notes it down."""

    def __init__(self) -> None:
        self.launched: list[Compiled] = []
        self.utils = SimpleNamespace(
            load_binary=self._load,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132},
        )
        self.get_current_stream = self.get_current_device = lambda *_: 0
        self.launcher_cls = lambda source, metadata: self._launch

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[int, Compiled, int, int, int]:
        registers, stack = _resources(code)
        return 1, Compiled(name, shared, registers, stack), registers, stack, 1024

    def _launch(self, x: int, y: int, z: int, stream: int, function: Compiled, *_: Any) -> None:
        self.launched.append(function)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")


_DRY = _DryDriver()  # one for the process, as Triton keeps what it has compiled


@contextmanager
def compiling() -> Iterator[list[Compiled]]:
    """Launches inside the block compile and do not run; the list grows by one for each.

    Raises:
        triton.runtime.errors.OutOfResources: by a launch that needs more shared memory than a program can have.
    """
    before = driver._active
    _DRY.launched = []
    driver.set_active(_DRY)
    try:
        yield _DRY.launched
    finally:
        driver._active = before


def _resources(code: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", report)}
    return usage["REG"], usage["STACK"]
