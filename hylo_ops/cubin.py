"""Device code: a packaged cubin, else an NVRTC compile of the exact shape, cached on disk.

A cubin's file name says what it was compiled from: stem, dims, architecture and a hash of the sources. So one made of
other sources is never taken. Only `load` needs a GPU.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

ARCH = "sm_90a"
_CAPABILITY = (9, 0)
SOURCES = (None, "packaged", "nvrtc")

_PACKAGE = Path(__file__).parent
_HEADER = "cuda_bf16.h"
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Spec:
    """One kernel file compiled for one set of dims.

    Args:
        stem, unit: csrc/<stem>/<unit>.cuh.
        defines: (name, value) pairs, passed as -DHYLO_<name>=<value>, in the order the file name has them.
    """

    stem: str
    defines: tuple[tuple[str, int | str], ...]
    unit: str = "kernel"

    def file_name(self, key: str) -> str:
        dims = "-".join(f"{name}{value}" for name, value in self.defines)
        return f"{self.stem}-{self.unit}-{dims}-{ARCH}-{key}.cubin"


def device_code(spec: Spec, *, source: str | None = None, cache_dir: Path | None = None) -> bytes:
    """The cubin of a spec.

    Args:
        source: None takes the packaged cubin if there is one, else NVRTC; "packaged" and "nvrtc" insist.
        cache_dir: where NVRTC's results are kept; `default_cache_dir()` if None.
    Raises:
        ValueError: an unknown source.
        NotImplementedError: no packaged cubin, or no NVRTC or CUDA headers; the message says which.
    """
    if source not in SOURCES:
        raise ValueError(f"the cubin source must be one of {list(SOURCES)}, got {source!r}")
    packaged = packaged_path(spec)
    if packaged.exists() and source != "nvrtc":
        return packaged.read_bytes()
    if source == "packaged":
        raise NotImplementedError(f"no cubin is packaged for {packaged.name.removesuffix('.cubin')}")
    return _cached(spec, cache_dir or default_cache_dir())


def compile_missing(specs: list[Spec], source: str | None) -> None:
    """Compiles at once what is not packaged (all, if `source` insists on NVRTC); `load` then finds it in the cache."""
    missing = [spec for spec in specs if source == "nvrtc" or not packaged_path(spec).exists()]
    if missing and source != "packaged":
        _nvrtc()  # imported here: threads that import it for the first time find it half made
        with ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1)) as threads:
            list(threads.map(functools.partial(device_code, source=source), missing))


def load(
    spec: Spec, kernel: str, device: int, *, shared_bytes: int = 0, max_cluster: int = 1, source: str | None = None
) -> "Kernel":
    """The kernel of that name, ready to launch on a CUDA device (torch's index).

    Args:
        shared_bytes: the most dynamic shared memory of a launch.
        max_cluster: the most blocks that a cluster of a launch has.
    """
    return native().Kernel(device_code(spec, source=source), kernel, device, shared_bytes, max_cluster)


@functools.cache
def why_not_device(device: int) -> str | None:
    """The reason why a CUDA device (torch's index) cannot run what is compiled for ARCH, or None."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability != _CAPABILITY:
        return f"cuda:{device} has compute capability {capability}, the kernel is compiled for {_CAPABILITY}"
    return None


@functools.cache
def why_not_native() -> str | None:
    """The reason why nothing can be launched here, whatever the GPU, or None."""
    try:
        native()
    except NotImplementedError as reason:
        return str(reason)
    return None


@functools.cache
def why_not_nvrtc() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    try:
        _nvrtc()
        cuda_include_dirs()
    except NotImplementedError as reason:
        return str(reason)
    return None


@functools.cache
def why_not(spec: Spec) -> str | None:
    """The reason why a spec's device code can be neither found nor compiled here, or None."""
    return None if packaged_path(spec).exists() else why_not_nvrtc()


def native() -> ModuleType:
    """`hylo_ops._C`."""
    try:
        return importlib.import_module("hylo_ops._C")
    except ImportError as error:
        raise NotImplementedError(f"hylo_ops._C is not built ({error}); reinstall hylo to build it") from error


def source_dir() -> Path:
    """csrc: inside an installed package, beside the package in a checkout."""
    installed = _PACKAGE / "csrc"
    return installed if installed.is_dir() else _PACKAGE.parent / "csrc"


def source_hash(stem: str, root: Path | None = None) -> str:
    """16 hex digits over every file that a kernel of this stem may include. CMakeLists.txt computes the same."""
    root = root or source_dir()
    files = [f for folder in ("common", stem) for f in (root / folder).glob("*") if f.suffix in (".h", ".cuh")]
    names = sorted(f.relative_to(root).as_posix() for f in files)
    lines = [f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def packaged_path(spec: Spec) -> Path:
    """Where the build puts this spec's cubin, if it is on CMakeLists.txt's list."""
    return _PACKAGE / "cubins" / spec.file_name(source_hash(spec.stem))


def default_cache_dir() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hylo_ops"


def cuda_include_dirs() -> list[str]:
    """Folders with CUDA's headers: torch's CUDA wheels, else a CUDA toolkit."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (wheels.submodule_search_locations or ())] if wheels else []
    candidates = [f / sub / "include" for f in folders for sub in ("cu13", "cuda_runtime")]
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += [Path(toolkit) / "include" for toolkit in toolkits if toolkit]
    for folder in candidates:
        if (folder / _HEADER).exists():
            return [str(f) for f in (folder, folder / "cccl") if f.is_dir()]
    raise NotImplementedError(
        f"NVRTC needs {_HEADER}, which is neither in torch's CUDA wheels (nvidia/cu13/include) nor in a CUDA toolkit "
        "(CUDA_HOME, CUDA_PATH or /usr/local/cuda)"
    )


def compile_nvrtc(spec: Spec, root: Path | None = None) -> bytes:
    """Compiles csrc/<stem>/<unit>.cuh; tens of milliseconds. Raises RuntimeError with NVRTC's log."""
    program, options, _ = _nvrtc()
    include = [str(root or source_dir()), *cuda_include_dirs()]
    macros = [(f"HYLO_{name}", str(value)) for name, value in spec.defines]
    chosen = options(arch=ARCH, std="c++17", include_path=include, define_macro=macros)
    compiled = program(f'#include "{spec.stem}/{spec.unit}.cuh"\n', "c++", chosen).compile("cubin")
    return bytes(compiled.code)


@functools.cache
def _nvrtc() -> tuple[Callable[..., Any], Callable[..., Any], str]:
    """cuda.core's Program and ProgramOptions, and NVRTC's version."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # RuntimeError: the wheel is there, its library is not
        raise NotImplementedError(f"NVRTC is not installed ({error}); try: pip install 'hylo[cuda]'") from error
    return Program, ProgramOptions, f"{major}.{minor}"


def _cached(spec: Spec, cache_dir: Path) -> bytes:
    """The file ends with the SHA-256 of the rest; a file that does not is compiled anew."""
    version = _nvrtc()[2]
    key = hashlib.sha256(f"{source_hash(spec.stem)} nvrtc {version}".encode()).hexdigest()[:16]
    path = cache_dir / spec.file_name(key)
    if path.exists():
        stored = path.read_bytes()
        code, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == digest:
            return code
    code = compile_nvrtc(spec)
    try:
        _write_atomically(path, code + hashlib.sha256(code).digest())
    except OSError as error:
        warnings.warn(f"the kernel cache cannot be written, so each process compiles anew: {error}", stacklevel=2)
    return code


def _write_atomically(path: Path, data: bytes) -> None:
    """Another process sees the old file, the new one or none, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
