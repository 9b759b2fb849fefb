"""The quickstart's text and tokenizer: what is held out stays out, and any text survives the tokenizer."""

import json

import pytest

from hylo.errors import UserError
from hylo.quickstart.corpus import (
    HELD_OUT,
    Document,
    load_corpus,
    write_jsonl,
    xz_bits_per_byte,
    xz_bits_per_byte_after,
)
from hylo.quickstart.tokenizer import VOCAB_SIZE, train_tokenizer


def test_held_out_modules_are_in_no_training_document(corpus):
    assert [d.name for d in corpus.held_out] == list(HELD_OUT)
    assert not {d.name for d in corpus.train} & set(HELD_OUT)
    texts = {d.text for d in corpus.held_out}
    assert not any(d.text in texts for d in corpus.train)


def test_held_out_share_of_the_text(corpus):
    share = corpus.held_out_bytes / (corpus.held_out_bytes + corpus.train_bytes)
    assert 0.04 < share < 0.07  # the upper end is Ubuntu's Python, which packs tkinter and idlelib apart


def test_held_out_modules_have_no_near_duplicate_in_the_training_text(corpus):
    def lines(document):
        return {line.strip() for line in document.text.splitlines() if len(line.strip()) >= 30}

    seen = set().union(*map(lines, corpus.train))
    shared = {d.name: len(lines(d) & seen) / len(lines(d)) for d in corpus.held_out}
    assert max(shared.values()) < 0.1, max(shared.items(), key=lambda item: item[1])


def test_tests_packages_and_generated_tables_are_left_out(corpus):
    names = {d.name for d in corpus.train}
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "pydoc_data", "__pycache__"}
    assert "encodings/utf_8.py" in names
    assert "encodings/cp1252.py" not in names
    assert "html/entities.py" not in names


def test_documents_are_sorted_and_read_as_python_reads_them(tmp_path, corpus):
    assert [d.name for d in corpus.train] == sorted(d.name for d in corpus.train)
    for name in HELD_OUT:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inside.py").write_text("y = 2\n")
    found = load_corpus(tmp_path)
    assert found.train == (Document("latin.py", "# -*- coding: latin-1 -*-\ns = 'é'\n"),)


def test_incomplete_library_is_refused(tmp_path):
    (tmp_path / "csv.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"no complete Python .* lacks asyncio/streams.py"):
        load_corpus(tmp_path)


def test_jsonl_keeps_names_and_texts(tmp_path):
    documents = (Document("a.py", "é = '\u2028'\n"), Document("b.py", "\n"))
    write_jsonl(documents, tmp_path / "text.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().split("\n")[:-1]]
    assert rows == [{"name": d.name, "text": d.text} for d in documents]


def test_xz_needs_fewer_bits_for_text_it_has_seen(corpus):
    document = corpus.train[0]
    alone = xz_bits_per_byte((document,))
    assert 0 < alone < 8
    assert xz_bits_per_byte_after((document,), (document,)) < 0.1 * alone


@pytest.mark.parametrize(
    "text",
    ["", "def f(x):\n\treturn  x\r\n", "naïve 日本語 🎉 \u2028 \x00", " . , n't 's  ", "\n\n    \n  a"],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_round_trip_of_the_held_out_text(tokenizer, corpus):
    for document in corpus.held_out:
        assert tokenizer.decode(tokenizer(document.text)["input_ids"]) == document.text


def test_bundled_tokenizer(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_tokenizer_training_is_deterministic():
    texts = ["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 20
    first, second = (train_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
