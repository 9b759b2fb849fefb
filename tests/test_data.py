"""Packing of text into token files, and batches as a pure function of seed and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from hylo.distill import data as data_module
from hylo.distill.data import Batches, pack
from hylo.distill.recipe import Data
from hylo.errors import UserError
from tests.distill_fixtures import byte_tokenizer


def make_data(root: Path, *sources: dict[str, str], **changes: object) -> Data:
    return Data.model_validate({"sources": list(sources), "cache_dir": str(root / "cache"), **changes})


def expected(*texts: str) -> list[int]:
    tokenizer = byte_tokenizer()
    return [i for text in texts for i in [0, *tokenizer(text)["input_ids"], 1]]


def cached(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "cache").iterdir()) if (root / "cache").exists() else []


def test_text_files_are_packed_in_sorted_order_with_separators(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second|third")
    (tmp_path / "a.txt").write_text("first é")
    tokens = pack(make_data(tmp_path, {"text": str(tmp_path / "*.txt"), "separator": "|"}), byte_tokenizer()).tokens
    assert tokens.tolist() == expected("first é", "second", "third")
    assert tokens.dtype == np.uint16


def test_exclude_leaves_files_out(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("yes")
    (tmp_path / "held_out.txt").write_text("no")
    data = make_data(tmp_path, {"text": str(tmp_path / "*.txt")}, exclude=["*/held_out.txt"])
    assert pack(data, byte_tokenizer()).tokens.tolist() == expected("yes")


def test_jsonl_takes_text_and_chats(tmp_path: Path) -> None:
    rows = [{"body": "one"}, {"body": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    tokens = pack(make_data(tmp_path, {"jsonl": str(tmp_path / "rows.jsonl"), "field": "body"}), tokenizer).tokens
    # The template wrote a BOS of its own, which is not doubled.
    assert tokens.tolist() == expected("one", "user:hi")


def test_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "from"}\n{"text": "a data set"}\n')
    tokens = pack(make_data(tmp_path, {"dataset": str(tmp_path / "set")}), byte_tokenizer()).tokens
    assert tokens.tolist() == expected("from", "a data set")


def test_tokenised_once_and_again_when_anything_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text")
    data = make_data(tmp_path, {"text": str(tmp_path / "a.txt")})
    pack(data, byte_tokenizer())
    with monkeypatch.context() as patch:
        patch.setattr(data_module, "_write_tokens", lambda *_: pytest.fail("tokenised twice"))
        pack(data, byte_tokenizer())
    pack(data, byte_tokenizer(bos=None))
    (tmp_path / "a.txt").write_text("some other text")
    assert pack(data, byte_tokenizer()).tokens.tolist() == expected("some other text")
    assert len(cached(tmp_path)) == 3


def test_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<high>")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(1 << 16)] + ["<high>"])
    tokens = pack(make_data(tmp_path, {"text": str(tmp_path / "a.txt")}), tokenizer).tokens
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [0, 258 + (1 << 16), 1]


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (b"good\nba\xffd", {"text": "a"}, r"a' is not UTF-8: byte 0xff at offset 7"),
        (b'{"text": "x"}\n{"text": "\xe9"}\n', {"jsonl": "a"}, r"a' is not UTF-8: byte 0xe9 at offset 24"),
        (b'{"text": "x"}\nnot json\n', {"jsonl": "a"}, r"a' line 2 is not JSON"),
        (b'{"body": "x"}\n', {"jsonl": "a"}, r"a' line 1 has no field 'text'"),
        (b'{"text": 3}\n', {"jsonl": "a"}, r"line 1, field 'text' is neither text nor a chat: '3'"),
        (b'{"text": [{"role": "user", "content": "x"}]}\n', {"jsonl": "a"}, r"has no chat template"),
        (b"", {"text": "a"}, r"the data sources hold no text"),
        (b"x", {"text": "nothing*"}, r"nothing\*' matches no file"),
    ],
)
def test_bad_sources_leave_nothing_behind(tmp_path: Path, content: bytes, source: dict[str, str], message: str) -> None:
    (tmp_path / "a").write_bytes(content)
    located = {kind: str(tmp_path / name) for kind, name in source.items()}
    with pytest.raises(UserError, match=message):
        pack(make_data(tmp_path, located), byte_tokenizer())
    assert cached(tmp_path) == []


def test_tokenizer_without_separators_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        pack(make_data(tmp_path, {"text": str(tmp_path / "a")}), byte_tokenizer(bos=None, eos=None))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_removes_the_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text " * 10_000)

    def on_full_disk(path: Path) -> BinaryIO:
        path.symlink_to("/dev/full")
        return path.open("wb")

    monkeypatch.setattr(data_module, "open_token_file", on_full_disk)
    with pytest.raises(UserError, match=r"no space left on the disk while writing '.*cache"):
        pack(make_data(tmp_path, {"text": str(tmp_path / "a.txt")}), byte_tokenizer())
    assert cached(tmp_path) == []


def batches(**changes: object) -> Batches:
    values: dict[str, object] = {"length": 7, "sequences_per_step": 4, "seed": 5} | changes
    return Batches(np.arange(703, dtype=np.uint16), **values)  # type: ignore[arg-type]


def test_batch_depends_on_seed_and_step_alone() -> None:
    forwards = [batches().batch(step) for step in range(40)]
    one = batches()
    for step in reversed(range(40)):
        assert torch.equal(one.batch(step), forwards[step])
    assert forwards[0].shape == (4, 7)
    assert forwards[0].dtype == torch.int64
    assert not torch.equal(batches(seed=6).batch(0), forwards[0])


def test_an_epoch_sees_every_sequence_once_in_a_new_order() -> None:
    stream = torch.cat([batches().batch(step) for step in range(50)])
    first, second = stream[:100], stream[100:200]
    whole = torch.arange(700).view(100, 7)
    for epoch in (first, second):
        assert torch.equal(epoch[epoch[:, 0].argsort()], whole)
    assert not torch.equal(first, second)


def test_gradient_accumulation_does_not_change_the_order() -> None:
    twice = batches(sequences_per_step=8)
    assert torch.equal(twice.batch(3), torch.cat([batches().batch(6), batches().batch(7)]))


def test_fraction_picks_a_fixed_share_spread_over_the_text() -> None:
    fifth = batches(fraction=0.2, sequences_per_step=20)
    assert fifth.sequences == 20
    starts = fifth.batch(0)[:, 0]
    assert starts.unique().numel() == 20
    assert set(fifth.batch(9)[:, 0].tolist()) == set(starts.tolist())
    assert starts.max() > 400


def test_too_little_text_is_refused() -> None:
    with pytest.raises(UserError, match="hold 703 tokens, fewer than one sequence of 704"):
        batches(length=704)
