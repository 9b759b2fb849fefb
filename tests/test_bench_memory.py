"""The memory benchmark: its cases are stages of recipes; and the formulas against training steps at true dims."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import memory
from bench.memory import CASES, Case, formulas
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
    rows = [re.split(r" ?\| ?", row) for row in page.splitlines()]
    table = {name: (gib, fullest) for _, name, _, gib, _, fullest, _ in (cells for cells in rows if len(cells) == 7)}
    for name, case in CASES.items():
        most = peak(stage_job(case.load(), case.stage))
        assert table[name] == (f"{most.total / 2**30:.1f}", most.name)


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
    assert max(expected.values()) == pytest.approx(max(measured.values()), rel=0.05)
    for phase, size in measured.items():
        assert expected[phase] == pytest.approx(size, rel=0.1), phase


def test_the_file_has_a_row_for_what_fits_and_what_does_not(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """With a GPU that takes what the formulas say, and has no more than 100 GiB."""

    def measure(recipe: Any, index: int, *_: Any) -> dict[str, int]:
        taken = {name: phase.total for name, phase in formulas(stage_job(recipe, index)).items()}
        if max(taken.values()) > 100 * 2**30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return taken

    for name, fake in {
        "measure": measure,
        "most_bytes": lambda: 0,
        "record": SimpleNamespace(meta=lambda commit: {"gpu": "NVIDIA Fake", "commit": commit}),
    }.items():
        monkeypatch.setattr(memory, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out = tmp_path / "results" / "memory.json"
    assert memory.main(["--out", str(out), "--commit", "abc"]) == 0
    written = json.loads(out.read_text())
    assert written["meta"] == {"gpu": "NVIDIA Fake", "commit": "abc"}
    rows = {row["case"]: row for row in written["rows"]}
    assert list(rows) == list(CASES)
    lacking = [name for name, row in rows.items() if row["peak_bytes"] is None]
    assert lacking == ["m2-64k-no-teacher-kept", "m2-64k-kept"]
    assert {row["ratio"] for row in rows.values()} == {1.0, None}
    printed = capsys.readouterr().out
    most = rows["1b-8k"]["peak_bytes"] / 2**30
    assert f"1b-8k: {most:.2f} GiB measured, {most:.2f} by formula (1.00): teacher forward" in printed
    assert "m2-64k-kept: out of memory; " in printed


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert memory.main([]) == 2
    assert "peaks of memory need an NVIDIA GPU" in capsys.readouterr().err
