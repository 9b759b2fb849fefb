"""The decode kernel's source, its launcher and its way around the dispatcher, run on the CPU by an emulated driver."""

import pytest
import torch

from hylo_ops.cubin import Spec, native
from tests.csrc.emulator import build
from tests.ops.gated_delta_rule_step_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("a real driver is here: tests/ops/test_gated_delta_rule_step_gpu.py runs the kernel itself")
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    native()
    specs = list(dict.fromkeys(Spec("gated_delta_rule", case.defines, "step") for case in CASES))
    return build.run("run_gated_delta_rule_step", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
