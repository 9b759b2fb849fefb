"""The CUDA kernels' source and their launchers, run on the CPU by an emulated driver: indexing, tails and algebra."""

import pytest

from hylo_ops.cubin import Spec
from tests.csrc.emulator import build
from tests.csrc.gated_rms_norm_cases import CASES, EMULATED_BACKWARD_CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("test_gated_rms_norm_cuda.py")
    specs = [Spec("gated_rms_norm", case.defines) for case in CASES if 0 not in case.shape]
    specs += [
        Spec("gated_rms_norm", case.defines, "backward") for case in EMULATED_BACKWARD_CASES if 0 not in case.shape
    ]
    return build.run("run_gated_rms_norm", list(dict.fromkeys(specs)), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts["forward"][case.name]


@pytest.mark.parametrize("case", EMULATED_BACKWARD_CASES, ids=lambda case: case.name)
def test_the_gradients_agree_with_float64(verdicts, case):
    assert not verdicts["backward"][case.name]
