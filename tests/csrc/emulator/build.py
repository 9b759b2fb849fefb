"""Compiles the emulated driver with kernel variants inside, as a libcuda.so.1 for a test's own subprocess."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hylo_ops.cubin import Spec, cuda_include_dirs, native, source_dir

HERE = Path(__file__).parent
HOST_HEADER = "crt/host_defines.h"


def why_not() -> str | None:
    if shutil.which("g++") is None:
        return "g++ is not installed"
    try:
        folders = header_dirs()
    except NotImplementedError as reason:
        return str(reason)
    return None if any((f / HOST_HEADER).exists() for f in folders) else f"no CUDA toolkit here has {HOST_HEADER}"


def skip_where_it_cannot_run(on_a_gpu: str) -> None:
    """Skips a test, with the reason, where there is a real driver, for which there is another file of tests, or no
    compiler."""
    if torch.cuda.is_available():
        pytest.skip(f"a real driver is here: {on_a_gpu} runs the kernels themselves")
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    native()


def header_dirs() -> list[Path]:
    """What NVRTC compiles with, and the toolkit beside nvcc, which has the host headers that torch's wheels lack."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return [*map(Path, cuda_include_dirs()), Path(nvcc).resolve().parent.parent / "include"]


def kernel_name(spec: Spec) -> str:
    """What stands in for the cubin of a spec."""
    return spec.file_name("emulated")


def build(specs: list[Spec], folder: Path) -> Path:
    """Returns the folder that belongs in front of LD_LIBRARY_PATH."""
    includes = [f"-I{d}" for d in (HERE, source_dir(), *header_dirs())]
    # Fortified jumps take another fiber's stack for a fault.
    compile_one = ["g++", "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-w", *includes, "-c"]
    commands = [[*compile_one, str(HERE / "driver.cpp"), "-o", str(folder / "driver.o")]]
    for i, spec in enumerate(specs):
        macros = [f"-DHYLO_{name}={value}" for name, value in spec.defines]
        macros += [f'-DHYLO_NAME="{kernel_name(spec)}"', f"-DHYLO_SYMBOL=emulated_{i}"]
        source = spec.stem if spec.unit == "kernel" else f"{spec.stem}_{spec.unit}"
        commands.append([*compile_one, *macros, str(HERE / f"{source}.cpp"), "-o", str(folder / f"{i}.o")])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    objects = [command[-1] for command in commands]
    subprocess.run(["g++", "-shared", "-o", str(folder / "libcuda.so.1"), *objects], check=True)
    return folder


def run(module: str, specs: list[Spec], folder: Path) -> Any:
    """What a module of this folder prints, as JSON, where the emulated driver has these specs."""
    build(specs, folder)
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.{module}"],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=source_dir().parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
