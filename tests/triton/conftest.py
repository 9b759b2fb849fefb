"""Triton's interpreter is chosen when a kernel is decorated, so these tests need a process of their own:

    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python -m pytest tests/triton

tests/test_triton.py starts it. Without the interpreter nothing here is collected.
"""

import dataclasses

import numpy
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

collect_ignore_glob = [] if triton.knobs.runtime.interpret else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def nan_in_fresh_memory():
    """What a kernel leaves unwritten in an allocation is NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.zeros(1).new_empty(3).isnan().all()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """NumPy and torch would fight for the cores; the interpreter's tiles are small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_time_is_lost():
    """Half of it: no checks of 32-bit sums for overflow, and functions of ours do not patch the language again, which
    the kernel that calls them has done."""
    options, call = interpreter.interpreter_builder.options, interpreter.InterpretedFunction.__call__

    def hasty(function, *args, **kwargs):
        ours = function.fn.__module__.startswith("hylo_ops")
        return function.rewrite()(*args, **kwargs) if ours else call(function, *args, **kwargs)

    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter.InterpretedFunction.__call__ = hasty
    yield
    interpreter.interpreter_builder.options = options
    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True, scope="session")
def bf16_is_rounded():
    """The interpreter of triton 3.6 cuts the bits off where a GPU rounds to the nearest bf16: twice the error."""
    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if target != tl.bfloat16:
            return convert(values, source, target, mode)
        return torch.from_numpy(numpy.array(values)).to(torch.bfloat16).view(torch.uint16).numpy()

    interpreter._convert_float = rounded
    yield
    interpreter._convert_float = convert
