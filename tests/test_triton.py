"""Runs tests/triton, the kernels in Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

ROOT = Path(__file__).parents[1]


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.timeout(900)
@pytest.mark.skipif(
    version(triton) == (3, 6) and version(numpy) >= (2, 4), reason="the interpreter of triton 3.6 needs numpy below 2.4"
)
def test_kernels_in_the_interpreter():
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "tests/triton"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
