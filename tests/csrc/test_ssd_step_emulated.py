"""The decode kernels, clusters of blocks included, and their launchers, run on the CPU by an emulated driver."""

import pytest

from tests.csrc.emulator import build
from tests.csrc.emulator.run_ssd_step import ALL, specs


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_ssd_step_gpu.py")
    return build.run("run_ssd_step", specs(), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
