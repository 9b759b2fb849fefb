"""The decode step's kernels around those of latent attention, and their launchers, on the CPU by an emulated driver."""

import pytest

from tests.csrc.emulator import build
from tests.csrc.emulator.run_mla_step import specs
from tests.ops.mla_step_cases import EMULATED


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_mla_step_gpu.py")
    return build.run("run_mla_step", specs(), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", EMULATED, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
