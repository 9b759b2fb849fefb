"""Every cubin on CMakeLists.txt's list, and the widest rows, for sm_90a: they compile, fit, and spill nothing."""

import dataclasses
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from hylo_ops import cubin
from hylo_ops.cubin import Spec
from hylo_ops.fused import cuda_mla
from hylo_ops.gated_rms_norm.cuda import BACKWARD_KERNELS, DWEIGHT_KERNEL, KERNEL, MAX_WIDTH
from hylo_ops.mla_absorb import cuda as mla_absorb
from hylo_ops.skinny_linear import cuda as skinny_linear
from hylo_ops.ssd import cuda_chunk, cuda_mamba2, cuda_plain, cuda_recurrent
from tests.csrc.emulator.run_mla_absorb import spec_for
from tests.csrc.emulator.run_ssd_step import spec_of
from tests.csrc.sanitizer_run import for_racecheck
from tests.ops.mla_absorb_cuda_cases import BENCHMARK, with_one_page
from tests.ops.ssd_step_cases import Case, Mamba2Case

NVRTC_REASON = cubin.why_not_nvrtc()
NVCC = shutil.which("nvcc")
needs_nvrtc = pytest.mark.skipif(NVRTC_REASON is not None, reason=f"cannot compile here: {NVRTC_REASON}")


def spec(width: int, vector: int, dtype: str, weight: str, unit: str = "kernel") -> Spec:
    return Spec("gated_rms_norm", (("V", width), ("VEC", vector), ("T", dtype), ("W", weight)), unit)


TYPES = [("bf16", 8), ("fp16", 8), ("fp32", 4)]
LISTED = [spec(width, vector, dtype, dtype) for width in (64, 128, 512, 2048) for dtype, vector in TYPES]
# Threads of a multiprocessor share 65536 registers: 32 a thread let it hold 2048, 52 still 1152.
REGISTERS = {64: 32, 128: 32, 512: 52, 2048: 56}
OTHERS = [spec(20, 4, "bf16", "bf16"), spec(333, 1, "bf16", "fp32"), spec(512, 8, "bf16", "fp32")]
WIDEST = [
    spec(MAX_WIDTH, 8, "bf16", "bf16"),
    spec(MAX_WIDTH, 4, "fp32", "fp32"),
    spec(MAX_WIDTH - 1, 1, "fp16", "fp32"),
]
BACKWARD = [Spec(s.stem, s.defines, "backward") for s in LISTED]
OTHER_BACKWARD = [Spec(s.stem, s.defines, "backward") for s in OTHERS + WIDEST]
OTHER_BACKWARD += [spec(2048, 8, "bf16", "fp32", "backward"), spec(8192, 8, "bf16", "fp32", "backward")]


def for_nvrtc(listed: list[Spec]) -> list[Spec]:
    """Of what nvcc compiles for the build, and a test finds without spills, bf16's; all where there is no nvcc."""
    return [s for s in listed if NVCC is None or ("T", "bf16") in s.defines]


@cache
def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    try:
        import triton
    except ImportError:
        return found
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found or (str(bundled) if bundled.exists() else None)


def packaged(files: str, listed: list[Spec]) -> Iterator[tuple[Spec, bytes]]:
    """What the build packaged of each, which is all that there is under such names."""
    paths = {spec: cubin.packaged_path(spec) for spec in listed}
    assert set(paths[listed[0]].parent.glob(files)) == set(paths.values())
    for spec, path in paths.items():
        yield spec, path.read_bytes()


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


SSD_KERNELS = {
    "kernel": ["fwd_kernel_ends", "fwd_kernel_carry", "fwd_kernel_o"],
    "backward": ["bwd_kernel_states", "bwd_kernel_vectors"],
    "gradients": ["bwd_kernel_gradients"],
}
SSD_MIXING = ["fwd_kernel_mix", "fwd_kernel_mixed_ends"]  # of states up to 128 wide
SSD_CHUNKED = [cuda_chunk.spec(dtype, width, None, "kernel") for dtype in HALVES for width in (64, 128, 256)]
SSD_CHUNKED += [cuda_chunk.spec(dtype, width, None, "backward") for dtype in HALVES for width in (64, 128)]
SSD_CHUNKED += [
    cuda_chunk.spec(dtype, width, values, "gradients")
    for dtype in HALVES
    for width in (64, 128)
    for values in (64, 128)
]
SSD_PLAIN_KERNELS = {
    "plain_forward": [f"fwd_kernel_plain_{name}" for name in ("factors", "ends", "carry", "o")],
    "plain_backward": [f"bwd_kernel_plain_{name}" for name in ("dx", "db", "dc", "ddt", "vectors")],
}
SSD_PLAIN = [cuda_plain.spec(dtype, unit) for unit in SSD_PLAIN_KERNELS for dtype in (*HALVES, "fp32")]

SSD_STEPS = [
    cuda_recurrent.spec(dtype, state, width, threads, rows)
    for dtype in HALVES
    for state, width, threads, rows in (
        ("fp32", 64, 64, 4),
        ("fp32", 64, 128, 8),
        ("bf16", 64, 64, 4),
        ("bf16", 64, 64, 8),
        ("fp32", 128, 64, 4),
        ("fp32", 128, 256, 8),
        ("bf16", 128, 64, 4),
        ("bf16", 128, 128, 8),
        ("fp32", 256, 64, 2),
        ("fp32", 256, 256, 4),
        ("bf16", 256, 64, 4),
        ("bf16", 256, 128, 8),
    )
]
OTHER_SSD_STEPS = [
    cuda_recurrent.spec(dtype, state, width, threads, rows)
    for dtype, state, width, threads, rows in (
        ("fp32", "bf16", 16, 128, 8),
        ("fp32", "bf16", 240, 128, 8),
        ("bf16", "fp32", 48, 64, 1),
        ("fp32", "fp32", 80, 256, 2),
        ("fp16", "fp32", 144, 256, 2),
        ("fp32", "fp32", 256, 256, 4),
    )
]
MAMBA2_STEPS = [
    cuda_mamba2.spec(dtype, dtype, dtype, state, width, 4, threads, rows)
    for dtype in HALVES
    for state, width, threads, rows in (
        ("fp32", 64, 256, 4),
        ("bf16", 64, 256, 2),
        ("fp32", 128, 512, 4),
        ("fp32", 128, 512, 8),
        ("bf16", 128, 512, 4),
        ("bf16", 128, 512, 8),
    )
]
OTHER_MAMBA2_STEPS = [
    cuda_mamba2.spec(*kind)
    for kind in (
        ("fp32", "fp32", "fp32", "fp32", 256, 4, 512, 4),
        ("fp32", "bf16", "fp32", "bf16", 256, 3, 256, 8),
        ("bf16", "fp32", "fp32", "fp32", 144, 4, 256, 1),
        ("fp16", "fp16", "bf16", "fp32", 80, 2, 512, 2),
        ("bf16", "bf16", "fp32", "bf16", 16, 4, 512, 8),
    )
]
MLA_ABSORB = [
    mla_absorb.spec(dtype, *dims)
    for dtype in HALVES
    for dims in (
        (128, 32, 32, False),
        (128, 64, 24, False),
        (256, 32, 32, False),
        (256, 64, 16, False),
        (256, 64, 16, True),
        (512, 64, 16, False),
        (512, 64, 32, False),
        (512, 64, 64, False),
        # of few short sequences
        (128, 32, 16, False),
        (128, 64, 8, False),
        (128, 64, 16, False),
        (256, 32, 16, False),
        (256, 64, 8, False),
        (256, 64, 8, True),
        (512, 64, 8, False),
    )
]
MLA_ABSORB += [
    mla_absorb.spec(dtype, *dims, False, fp8=True)
    for dtype in HALVES
    for dims in ((128, 32, 32), (256, 64, 16), (512, 64, 16))
]
# Where each number of query rows takes most registers.
OTHER_MLA_ABSORB = [
    mla_absorb.spec("bf16", *dims) for dims in ((128, 64, 64, True), (256, 64, 48, True), (448, 64, 32, True))
]
OTHER_MLA_ABSORB += [mla_absorb.spec("fp16", *dims) for dims in ((256, 64, 64, True), (512, 32, 64, True))]
OTHER_MLA_ABSORB += [
    mla_absorb.spec(dtype, *dims, fp8=True)
    for dtype, dims in (
        ("fp16", (128, 64, 64, True)),
        ("bf16", (256, 64, 32, True)),
        ("bf16", (448, 64, 32, True)),
        ("bf16", (512, 64, 24, False)),
    )
]
OTHER_MLA_ABSORB += [for_racecheck(mla_absorb.spec("bf16", *dims, False)) for dims in ((128, 32, 32), (512, 64, 64))]
MLA_STEP = [
    cuda_mla.spec(dtype, *widths) for dtype in HALVES for widths in ((32, 128), (64, 128), (64, 256), (128, 512))
]
SKINNY_LINEAR = [skinny_linear.spec(*of) for of in itertools.product(HALVES, (16, 32, 64), (False, True))]
PUBLISHED_BLOCKS = [  # heads, V, K; of x, b and c; norms: HyLo's, then Mamba2's
    (32, 64, 64, (8, 8, 32), 32),
    (24, 128, 128, (8, 8, 24), 24),
    (16, 128, 128, (8, 8, 16), 16),
    *((heads, 64, 128, (heads, 1, 1), 1) for heads in (24, 32, 48, 64, 80)),
]


def check_chunked(spec: Spec, code: bytes, folder: Path) -> None:
    for kernel in KERNELS[spec.unit]:
        used = resources(code, folder, f"gated_delta_rule_{kernel}")
        assert used["STACK"] == used["LOCAL"] == 0, kernel


@needs_nvrtc
@pytest.mark.parametrize("listed", for_nvrtc(CHUNKED), ids=lambda s: s.file_name("nvrtc"))
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


def check_step(code: bytes, folder: Path) -> None:
    used = resources(code, folder, "gated_delta_rule_fwd_kernel_step")
    assert used["STACK"] == used["LOCAL"] == 0


@needs_nvrtc
@pytest.mark.parametrize("listed", for_nvrtc(STEPS) + OTHER_STEPS, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_the_decode_step(listed, tmp_path):
    check_step(cubin.compile_nvrtc(listed), tmp_path)


def check_ssd_chunked(spec: Spec, code: bytes, folder: Path) -> None:
    mixing = SSD_MIXING if spec.unit == "kernel" and dict(spec.defines)["K"] <= 128 else []
    for kernel in SSD_KERNELS[spec.unit] + mixing:
        used = resources(code, folder, f"ssd_{kernel}")
        # Of the gradients at V = K = 128, a word for each set of heads: where the next one ends.
        assert used["STACK"] <= (8 if kernel == "bwd_kernel_gradients" and ("K", 128) in spec.defines else 0), kernel
        assert used["LOCAL"] == 0, kernel


@needs_nvrtc
@pytest.mark.parametrize("unit", SSD_KERNELS)
def test_nvrtc_compiles_the_chunked_kernels_of_ssd(unit, tmp_path):
    listed = next(spec for spec in SSD_CHUNKED if spec.unit == unit)
    check_ssd_chunked(listed, cubin.compile_nvrtc(listed), tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_the_chunked_kernels_of_ssd(tmp_path):
    for unit in SSD_KERNELS:
        for spec, code in packaged(f"ssd-{unit}-*", [spec for spec in SSD_CHUNKED if spec.unit == unit]):
            check_ssd_chunked(spec, code, tmp_path)


def check_ssd_plain(spec: Spec, code: bytes, folder: Path) -> None:
    for kernel in SSD_PLAIN_KERNELS[spec.unit]:
        used = resources(code, folder, f"ssd_{kernel}")
        assert used["STACK"] == used["LOCAL"] == 0, kernel
        assert used["REG"] <= 128, kernel  # two blocks of 256 threads on a multiprocessor


@needs_nvrtc
@pytest.mark.parametrize("unit", SSD_PLAIN_KERNELS)
def test_nvrtc_compiles_the_plain_kernels_of_ssd(unit, tmp_path):
    listed = cuda_plain.spec("fp32", unit)
    check_ssd_plain(listed, cubin.compile_nvrtc(listed), tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_the_plain_kernels_of_ssd(tmp_path):
    for spec, code in packaged("ssd-plain_*", SSD_PLAIN):
        check_ssd_plain(spec, code, tmp_path)


def check_ssd_step(spec: Spec, code: bytes, folder: Path) -> None:
    of_block = spec.unit == "mamba2_step"
    used = resources(code, folder, cuda_mamba2.KERNEL if of_block else cuda_recurrent.KERNEL)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= (64 if of_block else 96)  # 32 warps on a multiprocessor, or 20


NVRTC_STEPS = for_nvrtc(SSD_STEPS + MAMBA2_STEPS) + OTHER_SSD_STEPS + OTHER_MAMBA2_STEPS


@needs_nvrtc
@pytest.mark.parametrize("listed", NVRTC_STEPS, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_the_decode_steps_of_ssd(listed, tmp_path):
    check_ssd_step(listed, cubin.compile_nvrtc(listed), tmp_path)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", PUBLISHED_BLOCKS, ids=str)
@pytest.mark.parametrize("B", [1, 64])
def test_published_models_ask_for_listed_steps(block, state_dtype, B):
    H, V, K, shared, norms = block
    options = {"B": 1, "H": H, "shared": shared, "state_dtype": state_dtype, "index": None}
    for case in (Case(K, V, **options), Mamba2Case(K, V, **options, norms=norms)):
        x = case.inputs("cpu")
        for name in {"x", "b", "c", "z", "xbc", "dt", "conv_state", "state"} & x.keys():
            x[name] = x[name].expand(B, *x[name].shape[1:])  # as many, without the memory of as many
        assert spec_of(case, x) in SSD_STEPS + MAMBA2_STEPS


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_the_decode_steps_of_ssd(tmp_path):
    for unit, listed in (("step", SSD_STEPS), ("mamba2_step", MAMBA2_STEPS)):
        for spec, code in packaged(f"ssd-{unit}-*", listed):
            check_ssd_step(spec, code, tmp_path)


def check_mla_absorb(spec: Spec, code: bytes, folder: Path) -> None:
    used = resources(code, folder, mla_absorb.KERNEL)
    assert used["STACK"] == used["LOCAL"] == 0
    of_fp8 = ("FP8", 1) in spec.defines
    assert used["REG"] == (128 if of_fp8 else 168)  # all that 512 threads have, or 384, to be dealt out anew


@needs_nvrtc
@pytest.mark.parametrize("listed", OTHER_MLA_ABSORB, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_mla_absorb(listed, tmp_path):
    check_mla_absorb(listed, cubin.compile_nvrtc(listed), tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_mla_absorb(tmp_path):
    for spec, code in packaged("mla_absorb-*", MLA_ABSORB):
        check_mla_absorb(spec, code, tmp_path)


@pytest.mark.parametrize("name", ["hylo-1b", "hylo-3b", "qwen", "r256-e32", "deepseek-h16", "deepseek-h128"])
@pytest.mark.parametrize("tokens", [100, 1024, 2048, 4096, 8192, 131072])
def test_published_widths_ask_for_listed_kernels_of_mla_absorb(name, tokens):
    """However many query rows a tile has for so many sequences."""
    (case,) = (case for case in BENCHMARK if case.name == f"{name}-1x4k")
    for B in (1, 2, 3, 4, 6, 8, 12, 16, 24, 64):
        x = with_one_page(dataclasses.replace(case, B=B, S=tokens), "cpu")
        assert spec_for(x, False, name) in MLA_ABSORB
        if name == "qwen":  # whose rows may end with key scales
            cache = torch.zeros(*x["kv_cache"].shape[:2], case.R + case.E + case.HK, dtype=case.dtype)
            scaled = {"kv_cache": cache, "key_scale": cache[..., case.R + case.E :]}
            assert spec_for(x | scaled, False, name) in MLA_ABSORB


def check_mla_step(code: bytes, folder: Path) -> None:
    for kernel in cuda_mla.KERNELS:
        used = resources(code, folder, kernel)
        assert used["STACK"] == used["LOCAL"] == 0, kernel


@needs_nvrtc
def test_nvrtc_compiles_mla_step(tmp_path):
    """At the widths that take most registers."""
    check_mla_step(cubin.compile_nvrtc(cuda_mla.spec("fp16", 128, 576)), tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_mla_step(tmp_path):
    for _, code in packaged("mla_step-*", MLA_STEP):
        check_mla_step(code, tmp_path)


def check_skinny_linear(spec: Spec, code: bytes, folder: Path) -> None:
    used = resources(code, folder, skinny_linear.KERNEL)
    assert used["STACK"] == used["LOCAL"] == 0
    # two blocks of 288 threads on a multiprocessor, and without a convolution some of other kernels
    assert used["REG"] <= (112 if dict(spec.defines)["CONV"] else 80)


@needs_nvrtc
@pytest.mark.parametrize("listed", for_nvrtc(SKINNY_LINEAR), ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_skinny_linear(listed, tmp_path):
    check_skinny_linear(listed, cubin.compile_nvrtc(listed), tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_skinny_linear(tmp_path):
    for spec, code in packaged("skinny_linear-*", SKINNY_LINEAR):
        check_skinny_linear(spec, code, tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_build_packaged_gated_delta_rule(tmp_path):
    codes = dict(packaged("gated_delta_rule-*", CHUNKED + FP32_CHUNKED + STEPS))
    for spec in CHUNKED:
        check_chunked(spec, codes[spec], tmp_path)
    for spec in FP32_CHUNKED:
        check_fp32(spec, codes[spec], tmp_path)
    for spec in STEPS:
        check_step(codes[spec], tmp_path)


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


def check_backward(spec: Spec, code: bytes, folder: Path) -> None:
    for kernel in (*BACKWARD_KERNELS.values(), DWEIGHT_KERNEL):
        used = resources(code, folder, kernel)
        assert used["STACK"] == used["LOCAL"] == 0, kernel


@needs_nvrtc
@pytest.mark.parametrize("spec", BACKWARD[::2] + OTHER_BACKWARD, ids=lambda s: s.file_name("nvrtc"))
def test_nvrtc_compiles_the_backward_without_spills(spec, tmp_path):
    check_backward(spec, cubin.compile_nvrtc(spec), tmp_path)


@needs_nvrtc
def test_wider_rows_do_not_compile():
    with pytest.raises(Exception, match="static assertion"):
        cubin.compile_nvrtc(spec(MAX_WIDTH + 8, 8, "bf16", "bf16"))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
def test_the_list_here_is_the_builds(tmp_path):
    codes = dict(packaged("gated_rms_norm-*", LISTED + BACKWARD))
    for spec in BACKWARD:
        check_backward(spec, codes[spec], tmp_path)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so no cubin is packaged")
@pytest.mark.parametrize("listed", LISTED, ids=lambda s: s.file_name("packaged"))
def test_the_build_packaged_the_list(listed, tmp_path):
    """Of the present sources: CMake and Python agree on the hash in the file name."""
    path = cubin.packaged_path(listed)
    assert path.exists(), f"{path.name} is missing: reinstall hylo, its sources changed since the last build"
    used = resources(path.read_bytes(), tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= REGISTERS[listed.defines[0][1]]
