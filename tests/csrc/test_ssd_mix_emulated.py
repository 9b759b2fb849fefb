"""The source of the kernel that convolves a Mamba2 block's b and c, run on the CPU by an emulated driver."""

import pytest

from hylo_ops.ssd import cuda_chunk
from tests.csrc.emulator import build
from tests.ops.convolved_ssd_cases import CASES


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_convolved_ssd_gpu.py")
    specs = [cuda_chunk.spec(*kind, None, "kernel") for kind in (("bf16", 64), ("bf16", 128), ("fp16", 64))]
    return build.run("run_ssd_mix", specs, tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]
