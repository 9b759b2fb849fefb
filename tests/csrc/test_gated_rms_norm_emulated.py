"""The CUDA kernel's source and its launcher, run on the CPU by an emulated driver: indexing, tails and algebra."""

import pytest
import torch

from hylo_ops.cubin import Spec, native
from tests.csrc.emulator import build
from tests.csrc.gated_rms_norm_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("a real driver is here: test_gated_rms_norm_cuda.py runs the kernel itself")
    if (reason := build.why_not()) is not None:
        pytest.skip(reason)
    native()
    specs = list(dict.fromkeys(Spec("gated_rms_norm", case.defines) for case in CASES if 0 not in case.shape))
    return build.run("run_gated_rms_norm", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
