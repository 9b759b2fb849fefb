"""hylo_ops._C where there is no GPU and no driver: it imports, needs no CUDA library, and says what is missing."""

import ctypes
import subprocess
import sys

import pytest

from hylo_ops.cubin import native


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_imports_without_torch_and_without_a_cuda_library():
    """In a process of its own, since this one may have loaded anything."""
    path = native().__file__
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('hylo_ops._C', {path!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'cudart' not in maps and 'torch' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(has_driver(), reason="a CUDA driver is installed here")
def test_loading_a_kernel_says_that_there_is_no_driver():
    with pytest.raises(RuntimeError, match=r"no CUDA driver: libcuda\.so\.1"):
        native().Kernel(b"not looked at", "name", 0)
