"""The command line beyond upcycling: a wrong input is one sentence and exit code 2, and nothing is written."""

import sys

import pytest

from hylo.cli import main
from tests import tiny

RECIPE = """
name: wrong
output: {out}
student: {{path: {model}}}
data: {{sources: [{{text: {text}}}]}}
stages:
  - {{name: lm, kind: ce, sequence_length: 16, batch_size: 1, steps: 1, learning_rate: 1.0e-3{extra}}}
"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "llama"
    tiny.llama().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def run(monkeypatch, capsys, *arguments):
    """Exit code and the two streams of `hylo ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["hylo", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def one_sentence(error):
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        (b"plain text " * 50, ", lerning_rate: 1", "lerning_rate"),
        (b"plain text " * 50 + b"\xff", "", "is not UTF-8: byte 0xff at offset 550"),
        (b"plain text " * 50, ", sequence_length: 4096", "sequence_length"),
    ],
)
def test_distill_refuses(tmp_path, monkeypatch, capsys, model_dir, text, extra, message):
    (tmp_path / "text.txt").write_bytes(text)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(out=out, model=model_dir, text=tmp_path / "text.txt", extra=extra))
    code, _, error = run(monkeypatch, capsys, "distill", recipe)
    assert code == 2
    assert message in one_sentence(error)
    assert not out.exists()


def test_distill_trains_and_goes_on(tmp_path, monkeypatch, capsys, model_dir):
    (tmp_path / "text.txt").write_text(tiny.text())
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.format(out=out, model=model_dir, text=tmp_path / "text.txt", extra=""))
    code, output, _ = run(monkeypatch, capsys, "distill", recipe)
    assert code == 0
    assert (out / "lm" / "model" / "model.safetensors").is_file()
    assert str(out / "lm" / "model") in output.replace("\n", "")
    code, _, error = run(monkeypatch, capsys, "distill", recipe)
    assert code == 2
    assert str(out) in one_sentence(error)


def test_evaluate_refuses(tmp_path, monkeypatch, capsys, model_dir):
    text = tmp_path / "text.txt"
    text.write_bytes(b"caf\xe9")
    code, _, error = run(
        monkeypatch, capsys, "evaluate", model_dir, "--text", text, "--out", tmp_path / "out", "--window", 64
    )
    assert code == 2
    assert "UTF-8" in one_sentence(error)
    assert not (tmp_path / "out").exists()


def test_generate(tmp_path, monkeypatch, capsys, model_dir):
    code, output, _ = run(monkeypatch, capsys, "generate", model_dir, "--prompt", "The river", "--max-new-tokens", 3)
    assert code == 0
    assert output.startswith("The river")
    same = run(
        monkeypatch, capsys, "generate", model_dir, "--prompt", "The river", "--max-new-tokens", 3,
        "--prefill-chunk-size", 2,
    )  # fmt: skip
    assert same[1] == output


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("missing", [], "holds no model"),
        (None, ["--max-new-tokens", 9999], "exceed the model's 512"),
    ],
)
def test_generate_refuses(tmp_path, monkeypatch, capsys, model_dir, directory, options, message):
    where = model_dir if directory is None else tmp_path / directory
    code, _, error = run(monkeypatch, capsys, "generate", where, "--prompt", "The river", *options)
    assert code == 2
    assert message in one_sentence(error)


def test_quickstart_leaves_an_existing_directory_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = run(monkeypatch, capsys, "quickstart", "--short", "--out", tmp_path)
    assert code == 2
    assert str(tmp_path) in one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
