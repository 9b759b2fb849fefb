"""The decode kernel's source, its launcher and its way around the dispatcher, run on the CPU by an emulated driver."""

import pytest

from hylo_ops.cubin import Spec
from tests.csrc.emulator import build
from tests.ops.gated_delta_rule_step_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_gated_delta_rule_step_gpu.py")
    specs = list(dict.fromkeys(Spec("gated_delta_rule", case.defines, "step") for case in CASES))
    return build.run("run_gated_delta_rule_step", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
