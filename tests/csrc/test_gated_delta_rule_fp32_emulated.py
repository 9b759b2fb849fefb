"""The source of the chunked fp32 kernels and their launchers, run on the CPU by an emulated driver."""

import pytest

from hylo_ops.cubin import Spec
from hylo_ops.gated_delta_rule import cuda_inputs
from tests.csrc.emulator import build
from tests.ops.gated_delta_rule_fp32_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_gated_delta_rule_gpu.py")
    widths = sorted({cuda_inputs.width(case.K) for case in CASES})
    units = ("fp32_forward", "fp32_backward")
    specs = [Spec("gated_delta_rule", (("K", width),), unit) for width in widths for unit in units]
    return build.run("run_gated_delta_rule_fp32", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
