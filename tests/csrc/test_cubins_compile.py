"""Every cubin on CMakeLists.txt's list, and the widest rows, for sm_90a: they compile, fit, and spill nothing."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.gated_rms_norm.cuda import KERNEL, MAX_WIDTH

NVRTC_REASON = cubin.why_not_nvrtc()
needs_nvrtc = pytest.mark.skipif(NVRTC_REASON is not None, reason=f"cannot compile here: {NVRTC_REASON}")


def spec(width: int, vector: int, dtype: str, weight: str) -> Spec:
    return Spec("gated_rms_norm", (("V", width), ("VEC", vector), ("T", dtype), ("W", weight)))


TYPES = [("bf16", 8), ("fp16", 8), ("fp32", 4)]
LISTED = [spec(width, vector, dtype, dtype) for width in (64, 128, 512) for dtype, vector in TYPES]
# Threads of a multiprocessor share 65536 registers: 32 a thread let it hold 2048, 52 still 1152.
REGISTERS = {64: 32, 128: 32, 512: 52}
OTHERS = [spec(20, 4, "bf16", "bf16"), spec(333, 1, "bf16", "fp32"), spec(512, 8, "bf16", "fp32")]
WIDEST = [
    spec(MAX_WIDTH, 8, "bf16", "bf16"),
    spec(MAX_WIDTH, 4, "fp32", "fp32"),
    spec(MAX_WIDTH - 1, 1, "fp16", "fp32"),
]


@cache
def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    try:
        import triton
    except ImportError:
        return found
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found or (str(bundled) if bundled.exists() else None)


def resources(code: bytes, folder: Path, kernel: str = KERNEL) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a kernel, as cuobjdump reports them."""
    if cuobjdump() is None:
        pytest.skip("cuobjdump is neither installed nor in triton's package")
    path = folder / "kernel.cubin"
    path.write_bytes(code)
    report = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    usage = re.search(rf"Function {kernel}:\s*(.*)", report)
    assert usage, report
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage[1])}


def chunked(unit: str, dtype: str, width: int, chains: int | None = None) -> Spec:
    dims = ("T", dtype), ("K", width)
    return Spec("gated_delta_rule", dims if chains is None else (*dims, ("CHAINS", chains)), unit)


def step(dtype: str, state: str, width: int, raw: int, team: int) -> Spec:
    types = ("T", dtype), ("S", state)
    return Spec("gated_delta_rule", (*types, ("K", width), ("RAW", raw), ("TEAM", team)), "step")


HALVES = ("bf16", "fp16")
KERNELS = {
    "kernel": ["fwd_kernel_cuts", "fwd_kernel_inverse", "fwd_kernel_o"],
    "backward": ["bwd_kernel_states"],
    "solving": ["fwd_kernel_solving_o", "bwd_kernel_solving_states"],
    "dstates": ["bwd_kernel_dstates"],
    "gradients": ["bwd_kernel_gradients"],
}
CHUNKED = [
    chunked(unit, dtype, width)
    for unit in ("kernel", "backward", "gradients")
    for dtype in HALVES
    for width in (64, 128, 256)
]
CHUNKED += [chunked("solving", dtype, width) for dtype in HALVES for width in (64, 128)]
CHUNKED += [
    chunked("dstates", dtype, width, chains)
    for dtype in HALVES
    for width, chains in ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))
]
FP32_KERNELS = {
    "fp32_forward": ["fwd_kernel_fp32_inverse", "fwd_kernel_fp32_o"],
    "fp32_backward": [f"bwd_kernel_fp32_{name}" for name in ("states", "dstates", "dscores", "dqk")],
}
FP32_CHUNKED = [Spec("gated_delta_rule", (("K", width),), unit) for unit in FP32_KERNELS for width in (64, 128, 256)]
STEPS = [
    step(dtype, state, width, raw, team)
    for dtype in HALVES
    for state, wide in (("fp32", 256), ("bf16", 128))
    for width in (64, 128, 256)
    for raw in (0, 1)
    for team in (64, wide)
]
OTHER_STEPS = [
    step("fp32", state, width, 1, team)
    for state in ("fp32", "bf16")
    for width in (16, 48, 240, 256)
    for team in (64, 128)
]


def check_chunked(spec: Spec, code: bytes, folder: Path) -> None:
    for kernel in KERNELS[spec.unit]:
        used = resources(code, folder, f"gated_delta_rule_{kernel}")
        assert used["STACK"] == used["LOCAL"] == 0, kernel


@needs_nvrtc
@pytest.mark.parametrize("listed", CHUNKED, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_gated_delta_rule(listed, tmp_path):
    check_chunked(listed, cubin.compile_nvrtc(listed), tmp_path)


def check_fp32(spec: Spec, code: bytes, folder: Path) -> None:
    for kernel in FP32_KERNELS[spec.unit]:
        used = resources(code, folder, f"gated_delta_rule_{kernel}")
        assert used["STACK"] == used["LOCAL"] == 0, kernel
        assert used["REG"] <= 128, kernel  # two blocks of 256 threads on a multiprocessor


@needs_nvrtc
@pytest.mark.parametrize("listed", FP32_CHUNKED, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_gated_delta_rule_in_fp32(listed, tmp_path):
    check_fp32(listed, cubin.compile_nvrtc(listed), tmp_path)


@needs_nvrtc
@pytest.mark.parametrize("listed", STEPS + OTHER_STEPS, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_the_decode_step(listed, tmp_path):
    used = resources(cubin.compile_nvrtc(listed), tmp_path, "gated_delta_rule_fwd_kernel_step")
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_gated_delta_rule(tmp_path):
    listed = CHUNKED + FP32_CHUNKED + STEPS
    packaged = cubin.packaged_path(listed[0]).parent
    assert {f.name for f in packaged.glob("gated_delta_rule-*")} == {cubin.packaged_path(s).name for s in listed}
    for spec in CHUNKED:
        check_chunked(spec, cubin.packaged_path(spec).read_bytes(), tmp_path)
    for spec in FP32_CHUNKED:
        check_fp32(spec, cubin.packaged_path(spec).read_bytes(), tmp_path)


@needs_nvrtc
@pytest.mark.parametrize("listed", LISTED, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_the_list_without_spills(listed, tmp_path):
    used = resources(cubin.compile_nvrtc(listed), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= REGISTERS[listed.defines[0][1]]


@needs_nvrtc
@pytest.mark.parametrize("other", OTHERS + WIDEST, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_other_shapes_without_spills(other, tmp_path):
    used = resources(cubin.compile_nvrtc(other), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0


@needs_nvrtc
def test_wider_rows_do_not_compile():
    with pytest.raises(Exception, match="static assertion"):
        cubin.compile_nvrtc(spec(MAX_WIDTH + 8, 8, "bf16", "bf16"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_list_here_is_the_builds():
    packaged = cubin.packaged_path(LISTED[0]).parent
    assert {f.name for f in packaged.glob("gated_rms_norm-*")} == {cubin.packaged_path(s).name for s in LISTED}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed, so no cubin is packaged")
@pytest.mark.parametrize("listed", LISTED, ids=lambda s: s.file_name("packaged"))
def test_the_build_packaged_the_list(listed, tmp_path):
    """Of the present sources: CMake and Python agree on the hash in the file name."""
    path = cubin.packaged_path(listed)
    assert path.exists(), f"{path.name} is missing: reinstall hylo, its sources changed since the last build"
    used = resources(path.read_bytes(), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= REGISTERS[listed.defines[0][1]]
