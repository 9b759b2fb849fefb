"""The source of ssd's plain kernels and their launchers, run on the CPU by an emulated driver."""

import pytest

from hylo_ops.ssd import cuda_plain
from tests.csrc.emulator import build
from tests.ops.ssd_plain_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_ssd_gpu.py")
    specs = [
        cuda_plain.spec(dtype, f"plain_{way}") for dtype in ("fp32", "bf16", "fp16") for way in ("forward", "backward")
    ]
    return build.run("run_ssd_plain", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
