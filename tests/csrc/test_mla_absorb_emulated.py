"""The decode kernel of latent attention and its launcher, run on the CPU by an emulated driver."""

import shutil
import subprocess

import pytest
import torch

from hylo_ops.cubin import native, source_dir
from tests.csrc.emulator import build
from tests.csrc.emulator.run_mla_absorb import CPU, EMULATED, specs
from tests.ops.mla_absorb_cuda_cases import BENCHMARK, NAMES, Case, with_one_page


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    build.skip_where_it_cannot_run("tests/ops/test_mla_absorb_gpu.py")
    return build.run("run_mla_absorb", specs(), tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("case", EMULATED, ids=lambda case: case.name)
def test_agrees_with_float64(verdicts, case):
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
    return backend.why_not(tuple(x[name] for name in NAMES))


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


@pytest.mark.parametrize("case", BENCHMARK, ids=lambda case: case.name)
def test_every_case_of_the_benchmark_is_taken(case):
    assert answer_to(with_one_page(case, "cpu")) == "any kernel"


REFUSED = {
    "not one dtype": lambda x: {"q_nope": x["q_nope"].half(), "q_rope": x["q_rope"].half()},
    "in fp32": lambda x: {name: x[name].float() for name in ("q_nope", "q_rope", "kv_cache", "key_scale")},
    "rows of bytes": lambda x: {"kv_cache": torch.zeros(5, 64, 208, dtype=torch.uint8), "key_scale": None},
    "rows in fp8": lambda x: {"kv_cache": torch.zeros(5, 64, 208).to(torch.float8_e4m3fn), "key_scale": None},
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


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    x = Case(128, 32, 32, (100, 70), HK=4).inputs("cpu")
    answer = why_not(**REFUSED[what](x))
    assert isinstance(answer, str)
    assert answer != "any kernel"
