"""The bundled teacher, and the quickstart's whole road on a small text."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from hylo.errors import UserError
from hylo.quickstart import run
from hylo.quickstart.__main__ import main
from hylo.quickstart.corpus import Corpus, xz_bits_per_byte
from hylo.quickstart.measure import held_out_text, model_loss, stage_rows, stage_seconds
from hylo.quickstart.run import RECIPE, TEACHER, load, run_quickstart
from hylo.quickstart.train_teacher import teacher_config

REPORT_FIELDS = {
    "teacher_loss",
    "loss_after_init",
    "loss_after_ild",
    "loss_after_kd",
    "teacher_bits_per_byte",
    "hybrid_bits_per_byte",
    "xz_bits_per_byte",
    "cache_bytes_per_token",
    "state_bytes_per_sequence",
    "cache_percent",
    "crossover_tokens",
    "needle",
    "sample",
    "seconds",
    "mixer_types",
    "parameters",
    "training",
    "training_text_bytes",
    "held_out_bytes",
    "held_out_tokens",
    "short",
    "versions",
}


def test_teacher_is_small_and_of_the_recorded_shape(tokenizer):
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER)
    assert (TEACHER / "model.safetensors").stat().st_size <= 8_000_000
    assert teacher.dtype == torch.bfloat16
    assert 3_000_000 <= sum(p.numel() for p in teacher.parameters()) <= 4_000_000
    wanted = teacher_config(tokenizer)
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rope_parameters"):
        assert getattr(teacher.config, name) == getattr(wanted, name)


def test_teacher_beats_xz_on_held_out_modules(tokenizer, corpus):
    documents = tuple(d for d in corpus.held_out if d.name in ("graphlib.py", "shlex.py", "html/parser.py"))
    text = "".join(d.text for d in documents)
    bits = model_loss(load(TEACHER), tokenizer, text).bits_per_byte
    assert bits < xz_bits_per_byte(documents)


def test_recorded_training_beats_xz_on_all_held_out_text():
    facts = json.loads((TEACHER / "training.json").read_text())
    assert facts["held_out_bits_per_byte"] < facts["xz_bits_per_byte"]
    assert (TEACHER.parent / facts["recipe"]).is_file()
    assert {"device", "steps", "tokens", "seconds", "python", "torch", "training_loss"} <= facts.keys()


@pytest.fixture
def small(monkeypatch, tmp_path, corpus):
    """The quickstart on nine modules, with two steps a stage."""
    held_out = next(d for d in corpus.held_out if d.name == "graphlib.py")
    text = Corpus(train=corpus.train[:8], held_out=(held_out,))
    monkeypatch.setattr(run, "load_corpus", lambda: text)
    monkeypatch.setattr(run, "NEEDLE", replace(run.NEEDLE, lengths=(96,), depths=(0.5,), repeats=1))
    monkeypatch.setitem(run.HYBRID, "init", "published")  # needs no text written by the teacher first
    recipe = tmp_path / "quickstart.yaml"
    lines = RECIPE.read_text().splitlines()
    recipe.write_text("\n".join("    steps: 20" if line.startswith("    steps:") else line for line in lines))
    monkeypatch.setattr(run, "RECIPE", recipe)
    return tmp_path / "out"


def test_whole_road(small):
    report = run_quickstart(small, short=True, console=Console(quiet=True))
    written = json.loads((small / "report.json").read_text())
    assert written == report.model_dump(mode="json")
    assert written.keys() == REPORT_FIELDS
    assert written["cache_bytes_per_token"].keys() == {"teacher", "hybrid"}
    assert written["state_bytes_per_sequence"]["teacher"] == 0
    assert written["cache_percent"] <= 10
    assert written["training"]["kd"]["steps"] == 2
    assert written["seconds"].keys() >= {"corpus", "upcycle", "ild", "kd", "evaluation", "total"}
    assert written["held_out_bytes"] == len(held_out_text(run.load_corpus()).encode())
    losses = [written[name] for name in ("loss_after_init", "loss_after_ild", "loss_after_kd")]
    assert len(set(losses)) == 3
    assert all(0 < written["teacher_loss"] < loss < 8 for loss in losses)
    page = (small / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert f"{report.teacher_loss:.4f}" in page

    with pytest.raises(UserError, match="exists"):
        run_quickstart(small, short=True)
    again = run_quickstart(small, short=True, resume=True, console=Console(quiet=True))
    assert again.loss_after_kd == report.loss_after_kd


def test_existing_directory_is_refused_and_left_alone(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    monkeypatch.setattr("sys.argv", ["quickstart", "--out", str(tmp_path)])
    assert main() == 2
    assert "error: output directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_stage_seconds_counts_every_process_of_a_resumed_run(tmp_path):
    rows = [
        {"stage": "kd", "step": 1, "tokens": 100, "tokens_per_second": 50.0, "seconds": 2.0},
        {"stage": "other", "step": 1, "tokens": 100, "tokens_per_second": 1.0, "seconds": 100.0},
        {"stage": "kd", "step": 3, "tokens": 300, "tokens_per_second": 100.0, "seconds": 2.0},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stage_seconds(stage_rows(log, "kd")) == pytest.approx(4.0)
