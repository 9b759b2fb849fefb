"""The evaluation report, its table, plots and files, and what `evaluate_command` refuses."""

import errno
import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hylo.errors import UserError
from hylo.evaluate import (
    EvaluationReport,
    NeedleSettings,
    encode_text,
    evaluate,
    evaluate_command,
    held_out_loss,
    render_table,
)
from hylo.evaluate import command as command_module
from hylo.evaluate.report import default_needle_lengths, format_bytes
from tests import tiny


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    settings = NeedleSettings(lengths=(120, 240), depths=(0.0, 0.5, 1.0), repeats=1)
    return evaluate(
        tiny.hylo(),
        tiny.tokenizer(),
        tiny.text()[:6000],
        teacher=tiny.llama(),
        window=128,
        batch_size=4,
        needle=settings,
        names=("student", "base"),
    )


def test_report_has_both_models(report):
    tokens = encode_text(tiny.tokenizer(), tiny.text()[:6000])
    for loss, model in ((report.loss.hybrid, tiny.hylo()), (report.loss.teacher, tiny.llama())):
        assert loss == held_out_loss(model, tokens, window=128, batch_size=4, bos_token_id=0, text_bytes=6000)
    assert report.cache_bytes_per_token.model_dump() == {"teacher": 2 * 2 * 2 * 8 * 4, "hybrid": (12 + 4) * 4}
    assert report.state_bytes_per_sequence.model_dump() == {"teacher": 0, "hybrid": 2 * 8 * 16 * 4 + 64 * 4 * 4}
    assert report.cache_measured.hybrid.state == 2048
    assert report.cache_percent.published == 25
    assert report.crossover_tokens == pytest.approx(2048 / (256 - 64))
    assert set(report.needle) == {"likelihood", "generation"}
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report


def test_report_without_teacher_and_needle(tmp_path):
    alone = evaluate(tiny.llama(), tiny.tokenizer(), tiny.text()[:3000], window=64)
    assert alone.loss.teacher is None
    assert alone.cache_percent is None
    assert alone.needle == {}
    assert [column.header for column in render_table(alone).columns] == ["", "hybrid"]
    command_module.write_report(alone, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "loss_by_position.png",
        "memory.png",
        "report.json",
    ]


def test_table_shows_the_numbers(report):
    console = Console(width=100, file=io.StringIO())
    console.print(render_table(report))
    shown = console.file.getvalue()
    for expected in ("student", "base", f"{report.loss.hybrid.loss:.4f}", "256 B", "2 KiB", "chance 10%"):
        assert expected in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1024}, "window of 1024 tokens is beyond the 512 positions of hybrid"),
        ({"needle": NeedleSettings(lengths=(510,))}, "526 tokens are beyond the 512 positions"),
        ({"teacher": "other vocabulary"}, "vocabularies differ: hybrid has 384 tokens, teacher has 400"),
        ({"text": "Too short."}, "fewer than one window of 64"),
    ],
)
def test_evaluate_refuses(changes, message):
    arguments = {"text": tiny.text()[:3000], "window": 64} | changes
    if "teacher" in changes:
        arguments["teacher"] = tiny.llama()
        arguments["teacher"].resize_token_embeddings(400, mean_resizing=False)
    with pytest.raises(UserError, match=message):
        evaluate(tiny.llama(), tiny.tokenizer(), **arguments)


def test_default_needle_lengths():
    assert default_needle_lengths(2048) == (256, 512, 1024, 2048)
    assert default_needle_lengths(300) == (150, 300)
    assert default_needle_lengths(40) == (40,)


def test_format_bytes():
    shown = {0: "0 B", 320: "320 B", 1010: "1010 B", 1536: "1.5 KiB", 36 * 2**20: "36 MiB", 224 * 2**30: "224 GiB"}
    assert {count: format_bytes(count) for count in shown} == shown


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "base"
    tiny.llama().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.text()[:5000], encoding="utf-8")
    return path


def test_command_writes_report_and_plots(checkpoint, text_file, tmp_path):
    hybrid, out = tmp_path / "hybrid", tmp_path / "runs" / "evaluation"
    tiny.hylo().save_pretrained(hybrid)
    tiny.tokenizer().save_pretrained(hybrid)
    result = evaluate_command(
        hybrid, checkpoint, text_file, out, window=192, needle="code", needle_repeats=1, needle_lengths=(96, 160)
    )
    data = json.loads((out / "report.json").read_text())
    assert data["name"] == {"teacher": "base", "hybrid": "hybrid"}
    assert data["cache_bytes_per_token"] == {"teacher": 256, "hybrid": 64}
    assert data["needle"]["likelihood"]["hybrid"]["lengths"] == [96, 160]
    assert EvaluationReport.model_validate(data) == result
    plots = ["loss_by_position.png", "memory.png", "needle_generation.png", "needle_likelihood.png"]
    assert sorted(p.name for p in out.iterdir()) == [*plots, "report.json"]
    for name in plots:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (out / name).stat().st_size > 10_000
    assert [p.name for p in out.parent.iterdir()] == ["evaluation"]


BAD_INPUT = {
    "no model": ("model", "model directory '.*nowhere' does not exist"),
    "empty model": ("empty model", "model directory '.*' holds no config.json"),
    "no teacher": ("teacher", "teacher directory '.*nowhere' does not exist"),
    "truncated": ("truncated", "cannot load '.*truncated'"),
    "missing weight": ("missing weight", r"cannot load '.*': 1 weights are missing, first 'model.norm.weight'"),
    "no text": ("text", "text file '.*nowhere' does not exist"),
    "other tokenizer": ("tokenizer", "tokenizers of '.*base' and '.*other' differ"),
    "not UTF-8": ("latin", "is not UTF-8: byte 0xe9 at offset 3"),
    "short text": ("short", "fewer than one window of 64"),
    "existing output": ("out", "output directory '.*' exists already"),
    "needle form": ("needle", "needle must be one of prose, code, got 'straw'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_command_refuses(case, checkpoint, text_file, tmp_path):
    kind, message = BAD_INPUT[case]
    arguments = {"model_dir": checkpoint, "teacher_dir": None, "text_path": text_file, "out_dir": tmp_path / "out"}
    options = {"window": 64, "needle": None}
    if kind in ("model", "teacher"):
        arguments[f"{kind}_dir"] = tmp_path / "nowhere"
    elif kind == "empty model":
        arguments["model_dir"] = tmp_path
    elif kind == "truncated":
        arguments["model_dir"] = truncated_copy(checkpoint, tmp_path / "truncated")
    elif kind == "missing weight":
        arguments["model_dir"] = copy_without_norm(checkpoint, tmp_path / "partial")
    elif kind == "tokenizer":
        arguments["teacher_dir"] = copy_with_another_token(checkpoint, tmp_path / "other")
    elif kind == "text":
        arguments["text_path"] = tmp_path / "nowhere"
    elif kind == "latin":
        text_file.write_bytes("café".encode("latin-1"))
    elif kind == "short":
        text_file.write_text("Too short.", encoding="utf-8")
    elif kind == "out":
        arguments["out_dir"] = checkpoint
    else:
        options["needle"] = "straw"
    before = listing(tmp_path)
    with pytest.raises(UserError, match=message):
        evaluate_command(**arguments, **options)
    assert listing(tmp_path) == before


def truncated_copy(checkpoint: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        (directory / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    return directory


def copy_without_norm(checkpoint: Path, directory: Path) -> Path:
    shutil.copytree(checkpoint, directory)
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def copy_with_another_token(checkpoint: Path, directory: Path) -> Path:
    shutil.copytree(checkpoint, directory)
    AutoTokenizer.from_pretrained(checkpoint, pad_token="<other>").save_pretrained(directory)
    return directory


def listing(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_size) for p in directory.rglob("*"))


def test_full_disk_leaves_nothing(report, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command_module, "write_plots", fail)
    with pytest.raises(UserError, match=r"no space left on the disk while writing '.*out'"):
        command_module.write_report(report, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
