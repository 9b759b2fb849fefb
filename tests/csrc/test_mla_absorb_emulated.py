"""The decode kernel of latent attention and its launcher, run on the CPU by an emulated driver."""

import shutil
import subprocess

import pytest
import torch

from hylo_ops import fp8_row_parts
from hylo_ops.cubin import native, source_dir
from tests.csrc.emulator import build
from tests.csrc.emulator.run_mla_absorb import CPU, EMULATED, GATHERED, spec_for, specs
from tests.ops.mla_absorb_cuda_cases import BENCHMARK, NAMES, Case, with_one_page


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_mla_absorb_gpu.py")
    return build.run("run_mla_absorb", specs(), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", EMULATED, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
    assert not verdicts[case.name]


@pytest.mark.parametrize("case", GATHERED, ids=lambda case: case.name)
def test_merges_together_whoever_waits_in_vain(verdicts, case):
    assert not verdicts[case.name]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_every_tile_is_taken_once(tmp_path):
    program = tmp_path / "work"
    source = build.HERE / "mla_absorb_work.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", f"-I{source_dir()}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def why_not(**changes):
    """Of one case with some of its tensors replaced, where any kernel can be had."""
    x = {**Case(128, 32, 32, (100, 70), HK=4).inputs("cpu"), **changes}
    return answer_to(x)


def answer_to(x):
    def nothing(*_):
        pytest.fail("only asked")

    backend = native().MlaAbsorb(torch, lambda *_: "any kernel", nothing, nothing, device_type=CPU)
    return backend.why_not(tuple(x[name] for name in NAMES), False)


def narrowed(tensor, width):
    """The tensor's first columns, in rows as far apart as before."""
    return tensor[..., :width]


def shifted(tensor):
    """The same numbers two bytes behind a multiple of 16."""
    moved = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 8, dtype=tensor.dtype)[..., 1 : tensor.shape[-1] + 1]
    return moved.copy_(tensor)


def test_what_is_taken():
    assert why_not() == "any kernel"
    x = Case(128, 32, 32, (100, 70), HK=4).inputs("cpu")
    wide = torch.zeros(2, 1, 32, 256, dtype=x["q_nope"].dtype)
    assert why_not(q_nope=narrowed(wide, 128)) == "any kernel"
    assert why_not(key_scale=None) == "any kernel"


def test_rows_in_fp8_are_taken():
    x = IN_FP8.inputs("cpu")
    assert answer_to(x) == "any kernel"
    assert answer_to({**x, "kv_cache": x["kv_cache"].view(torch.float8_e4m3fn)}) == "any kernel"
    assert answer_to({**x, "kv_cache": torch.zeros(5, 64, 208, dtype=torch.uint8), "key_scale": None}) == "any kernel"


@pytest.mark.parametrize("case", BENCHMARK, ids=lambda case: case.name)
def test_every_case_of_the_benchmark_is_taken(case):
    assert answer_to(with_one_page(case, "cpu")) == "any kernel"


# Of one sequence, and of one with a fixed split, where no other batch may change the bits.
ROWS_OF_A_TILE = {
    "hylo-1b-1x4k": (16, 32),
    "hylo-3b-1x4k": (8, 24),
    "qwen-1x4k": (8, 16),
    "r256-e32-1x4k": (16, 32),
    "deepseek-h16-1x4k": (8, 16),
    "hylo-1b-1x128k": (32, 32),
    "hylo-1b-32x4k": (32, 32),
    "hylo-1b-1x4k-fp8": (32, 32),
    "deepseek-h128-1x4k": (64, 64),
}


@pytest.mark.parametrize("name", ROWS_OF_A_TILE)
def test_few_short_sequences_have_their_query_rows_in_smaller_tiles(name):
    (case,) = (case for case in BENCHMARK if case.name == name)
    x = with_one_page(case, "cpu")
    asked = [dict(spec_for(x, fixed_split, name).defines)["N"] for fixed_split in (False, True)]
    assert tuple(asked) == ROWS_OF_A_TILE[name]


REFUSED = {
    "not one dtype": lambda x: {"q_nope": x["q_nope"].half(), "q_rope": x["q_rope"].half()},
    "in fp32": lambda x: {name: x[name].float() for name in ("q_nope", "q_rope", "kv_cache", "key_scale")},
    "rows of integers": lambda x: {"kv_cache": torch.zeros(5, 64, 208, dtype=torch.int8), "key_scale": None},
    "rows in another fp8": lambda x: {"kv_cache": torch.zeros(5, 64, 208).to(torch.float8_e5m2), "key_scale": None},
    "queries that start between": lambda x: {"q_nope": shifted(x["q_nope"])},
    "a cache that starts between": lambda x: {"kv_cache": shifted(x["kv_cache"]), "key_scale": None},
    "a transposed cache": lambda x: {"kv_cache": x["kv_cache"].mT.contiguous().mT, "key_scale": None},
    "key scales of their own": lambda x: {"key_scale": x["key_scale"].clone()},
    "pages of 65 tokens": lambda x: {"kv_cache": torch.zeros(5, 65, 164, dtype=torch.bfloat16), "key_scale": None},
    "R of 120": lambda x: {"q_nope": narrowed(x["q_nope"], 120)},
    "R of 592": lambda x: {
        "q_nope": torch.zeros(2, 1, 32, 592, dtype=torch.bfloat16),
        "kv_cache": torch.zeros(5, 64, 640, dtype=torch.bfloat16),
        "key_scale": None,
    },
    "E of 8": lambda x: {"q_rope": narrowed(x["q_rope"], 8)},
    "2048 query rows": lambda x: {
        "q_nope": torch.zeros(2, 64, 32, 128, dtype=torch.bfloat16),
        "q_rope": torch.zeros(2, 64, 32, 32, dtype=torch.bfloat16),
    },
    "no pages": lambda x: {"kv_cache": x["kv_cache"][:0], "key_scale": None},
    "lengths of another batch": lambda x: {"cache_seqlens": x["cache_seqlens"][:1]},
    "lengths in fp32": lambda x: {"cache_seqlens": x["cache_seqlens"].float()},
}


IN_FP8 = Case(128, 32, 32, (100, 70), HK=4, fp8=True)
REFUSED_IN_FP8 = {
    "queries in fp32": lambda x: {"q_nope": x["q_nope"].float(), "q_rope": x["q_rope"].float()},
    "rows without room for rope": lambda x: {"kv_cache": narrowed(x["kv_cache"], 207), "key_scale": None},
    "rows that end before their key scales": lambda x: {"kv_cache": narrowed(x["kv_cache"], 208)},
    "rows that start between": lambda x: {"kv_cache": narrowed(longer(x["kv_cache"], 8), 208), "key_scale": None},
    "rows at odd places": lambda x: {"kv_cache": longer(x["kv_cache"], 8)[..., 8:216], "key_scale": None},
    "key scales of their own": lambda x: {"key_scale": x["key_scale"].clone()},
    "key scales in another dtype": lambda x: {"key_scale": x["key_scale"].view(torch.float16)},
    "key scales out of place": lambda x: {"key_scale": parts_of(x)[..., 24:28]},
    "17 key scales": lambda x: {
        "q_nope": x["q_nope"][:, :, :17],
        "q_rope": x["q_rope"][:, :, :17],
        "key_scale": fp8_row_parts(longer(x["kv_cache"], 32), latent_rank=128, dtype=torch.bfloat16)[2][..., 32:49],
    },
}


def longer(rows, size):
    return torch.nn.functional.pad(rows, (0, size))


def parts_of(x):
    return fp8_row_parts(x["kv_cache"], latent_rank=128, dtype=torch.bfloat16)[2]


@pytest.mark.parametrize(
    ("case", "change"),
    [
        *((Case(128, 32, 32, (100, 70), HK=4), change) for change in REFUSED.values()),
        *((IN_FP8, change) for change in REFUSED_IN_FP8.values()),
    ],
    ids=[*REFUSED, *(f"{what} beside fp8" for what in REFUSED_IN_FP8)],
)
def test_what_is_refused(case, change):
    x = case.inputs("cpu")
    answer = answer_to({**x, **change(x)})
    assert isinstance(answer, str)
    assert answer != "any kernel"
