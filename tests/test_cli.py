"""The command line beyond upcycling: a wrong input is one sentence and exit code 2, and nothing is written."""

import io
import re
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from hylo.cli import main
from hylo.generate import Detokenizer, Progress
from tests import tiny

RECIPE = """
name: wrong
output: {out}
student: {{path: {model}}}
data: {{sources: [{{text: {text}}}]}}
stages:
  - {{name: lm, kind: ce, sequence_length: 16, batch_size: 1, steps: 1, learning_rate: 1.0e-3{extra}}}
"""


def saved(model, tmp_path_factory):
    """Directory with the model and a tokenizer."""
    directory = tmp_path_factory.mktemp("model") / "model"
    for part in (model, tiny.tokenizer()):
        part.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return saved(tiny.llama(), tmp_path_factory)


@pytest.fixture(scope="module")
def hybrid_dir(tmp_path_factory):
    return saved(tiny.hylo(), tmp_path_factory)


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


def continuation(directory, prompt, new):
    """What transformers' own generate() gives."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), tiny.tokenizer()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return tokenizer.decode(found[0], skip_special_tokens=True)[len(prompt) :]


@pytest.mark.parametrize("kind", ["model_dir", "hybrid_dir"])
def test_generate(monkeypatch, capsys, request, kind):
    directory = request.getfixturevalue(kind)
    code, output, _ = run(monkeypatch, capsys, "generate", directory, "--prompt", "The river", "--max-new-tokens", 20)
    assert code == 0
    assert output == f"The river{continuation(directory, 'The river', 20)}\n"
    same = run(
        monkeypatch, capsys, "generate", directory, "--prompt", "The river", "--max-new-tokens", 20,
        "--prefill-chunk-size", 2,
    )  # fmt: skip
    assert same[1] == output


def test_generate_goes_on_from_a_file(tmp_path, monkeypatch, capsys, hybrid_dir):
    """Its text is not repeated; what was read, and how fast, is on standard error."""
    prompt = tiny.text()[:600]
    (tmp_path / "prompt.txt").write_text(prompt)
    code, output, error = run(
        monkeypatch, capsys, "generate", hybrid_dir, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9
    )
    assert code == 0
    assert output == continuation(hybrid_dir, prompt, 9) + "\n"
    count = len(tiny.tokenizer()(prompt).input_ids)
    assert re.search(rf"^prompt: {count} tokens in .* tokens/s\nnew: 9 tokens in .* tokens/s\n\Z", error, re.M)


def test_generate_draws_by_its_seed(monkeypatch, capsys, hybrid_dir):
    drawn = [
        run(
            monkeypatch, capsys, "generate", hybrid_dir, "--prompt", "The river", "--temperature", 1, "--top-k", 50,
            "--top-p", 0.9, "--seed", seed, "--max-new-tokens", 12,
        )[1]
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_progress_tells_rate_and_time_left(monkeypatch):
    clock, stream = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress("prompt", stream)
    for seconds, done in ((5, 50), (20, 200), (25, 250)):
        clock[0] = 100.0 + seconds
        progress(done, 1000)
    progress.finish(1000)
    assert stream.getvalue().splitlines() == [
        "prompt: 200 of 1000 tokens, 10 tokens/s, 80 s left",
        "prompt: 1000 tokens in 25.0 s, 40 tokens/s",
    ]


def test_text_comes_in_whole_characters():
    """Byte tokens of a letter, of an accent and of an emoji: nothing of a character before all of it."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer("a é 🙂 z").input_ids
    detokenizer = Detokenizer(tokenizer, tokenizer("The river").input_ids)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) == "a é 🙂 z"
    assert detokenizer.flush() == ""
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.push(tokenizer("🙂").input_ids[0]) == ""
    assert "\ufffd" in detokenizer.flush()


@pytest.mark.parametrize(
    ("directory", "options", "message"),
    [
        ("missing", [], "holds no model"),
        (None, ["--max-new-tokens", 9999], "exceed the model's 512"),
        (None, ["--max-new-tokens", 0], "max_new_tokens must be at least 1, got 0"),
        (None, ["--prefill-chunk-size", 0], "prefill_chunk_size must be at least 1, got 0"),
        (None, ["--temperature", -1], "temperature must be a number from 0 on, got -1.0"),
        (None, ["--top-k", 5], "top_k and top_p need a temperature above 0"),
        (None, ["--prompt-file", "other.txt"], "give either --prompt or --prompt-file"),
    ],
)
def test_generate_refuses(tmp_path, monkeypatch, capsys, hybrid_dir, directory, options, message):
    where = hybrid_dir if directory is None else tmp_path / directory
    code, output, error = run(monkeypatch, capsys, "generate", where, "--prompt", "The river", *options)
    assert code == 2
    assert message in one_sentence(error)
    assert output == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read text file"), (b"caf\xe9", "is not UTF-8: byte 0xe9 at offset 3"), (b"", "at least one token")],
)
def test_generate_refuses_a_file(tmp_path, monkeypatch, capsys, hybrid_dir, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    code, _, error = run(monkeypatch, capsys, "generate", hybrid_dir, "--prompt-file", path)
    assert code == 2
    assert message in one_sentence(error)


def test_quickstart_leaves_an_existing_directory_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = run(monkeypatch, capsys, "quickstart", "--short", "--out", tmp_path)
    assert code == 2
    assert str(tmp_path) in one_sentence(error)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
