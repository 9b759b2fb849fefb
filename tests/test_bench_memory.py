"""The memory benchmark: its cases are stages of recipes; and the formulas against training steps at true dims."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import memory
from bench.memory import CASES, Case, formulas, line
from hylo.memory import peak, stage_job
from hylo.memory.training import loss_room
from tests.fake_memory import counted_shapes


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_formulas_for_the_phases_that_are_measured(name: str) -> None:
    case = CASES[name]
    job = stage_job(case.load(), case.stage)
    student = {"student forward", "loss"} if job.kind != "ild" else set()
    teacher = {"teacher forward"} if job.kind == "kl" else set()
    assert set(formulas(job)) == student | teacher | {"backward", "optimiser step"}


def test_the_page_has_the_formulas_peaks() -> None:
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    table = {
        cells[1]: cells[3:5] for cells in (re.split(r" ?\| ?", row) for row in page.splitlines()) if len(cells) == 6
    }
    for name, case in CASES.items():
        most = peak(stage_job(case.load(), case.stage))
        assert table[name] == [f"{most.total / 2**30:.1f}", most.name]


_LONG, _SHORT = ({"sequence_length": length, "batch_size": 1} for length in (65536, 8192))
SHAPES = {
    "align": CASES["1b-align"],
    "kept-fp32": Case(memory.LLAMA, 1, _SHORT | {"precision": "fp32", "activation_checkpointing": False}),
    "first": CASES["1b-8k-first"],
    "long-tiles": Case(memory.LLAMA, 1, _LONG | {"mlp_tile_tokens": 16384}),
    "long-mamba2": CASES["m2-64k"],
    "qk-norm": CASES["qwen-8k"],
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_training_step_as_shapes_takes_what_the_formulas_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phase by phase, at true dims. What kernels take for themselves shapes do not show."""
    case = SHAPES[name]
    recipe = case.load()
    with counted_shapes(monkeypatch) as counted:
        measured = memory.measure(recipe, case.stage, torch.device("cpu"), counted.take)
    job = replace(stage_job(recipe, case.stage), cuda=False)
    expected = {phase: parts.total for phase, parts in formulas(job).items()}
    assert set(measured) == set(expected)
    if "loss" in expected:
        d = job.student.hidden_size
        results = 4 * job.student.vocab_size * d + job.numbers.size * job.tokens * d
        expected["loss"] -= loss_room(job) - results
    # On a CPU the optimiser goes from tensor to tensor.
    assert measured.pop("optimiser step") <= expected.pop("optimiser step")
    assert max(expected.values()) == pytest.approx(max(measured.values()), rel=0.05)
    for phase, size in measured.items():
        assert expected[phase] == pytest.approx(size, rel=0.1), phase


def test_a_line_for_what_does_not_fit() -> None:
    found = {"case": "m2", "formula_peak_bytes": 3 * 2**30, "peak_bytes": None}
    assert line(found) == "m2: out of memory; 3.00 GiB by formula"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert memory.main([]) == 2
    assert "peaks of memory need an NVIDIA GPU" in capsys.readouterr().err
