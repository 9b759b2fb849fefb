"""Includes point downwards only (common <- a stem <- bindings), and no torch or CUDA runtime header comes in."""

import re

import pytest

from hylo_ops.cubin import source_dir

ROOT = source_dir()
FILES = sorted(f for f in ROOT.rglob("*") if f.suffix in (".h", ".cuh", ".cpp"))
SYSTEM_FORBIDDEN = re.compile(r"^(torch|ATen|c10|cutlass|cute|cuda\.h$|cuda_runtime)")


def includes(text: str) -> list[tuple[str, str]]:
    """(delimiter, path) of each #include."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, flags=re.MULTILINE)


def violations(floor: str, text: str) -> list[str]:
    """What a file of the folder `floor` includes and must not."""
    wrong = []
    for delimiter, path in includes(text):
        target = path.split("/")[0]
        if delimiter == "<":
            allowed = not SYSTEM_FORBIDDEN.match(path) and (floor == "bindings" or not path.startswith("pybind11"))
        else:
            stems = floor == "bindings" and target != "bindings"
            allowed = target in ("common", floor) or stems
        if not allowed:
            wrong.append(path)
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_includes_point_downwards(file):
    text = file.read_text()
    assert violations(file.relative_to(ROOT).parts[0], text) == []
    for delimiter, path in includes(text):
        assert delimiter == "<" or (ROOT / path).exists()


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("common", '#include "gated_rms_norm/params.h"'),
        ("ssd", '#include "gated_rms_norm/params.h"'),
        ("ssd", '#include "bindings/module.h"'),
        ("ssd", "#include <torch/extension.h>"),
        ("bindings", "#  include <ATen/ATen.h>"),
        ("ssd", "#include <pybind11/pybind11.h>"),
        ("common", "#include <cuda.h>"),
    ],
)
def test_the_rule_catches(floor, line):
    assert violations(floor, f"// a file\n{line}\n") != []


def test_every_stem_has_its_four_parts():
    stems = [d for d in ROOT.iterdir() if d.is_dir() and d.name not in ("common", "bindings")]
    assert stems
    for stem in stems:
        assert {"params.h", "traits.cuh", "kernel.cuh", "launch.cpp"} <= {f.name for f in stem.iterdir()}
