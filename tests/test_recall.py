"""Recall documents: facts told in a text and asked for again, as a source of a stage of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hylo.distill import parse_recipe, run_recipe
from hylo.distill.data import pack
from hylo.distill.recall import recall_documents
from hylo.distill.recipe import Recall
from hylo.errors import UserError
from tests import tiny
from tests.distill_fixtures import byte_tokenizer, logged, make_world, quiet, recipe_values, write_text

PATTERN = {"fact": " Now {key} has {value}.", "question": " What has {key}? It is {value}."}
WORDS = "".join(chr(97 + i) + chr(97 + j) + "rst " for i in range(26) for j in range(26))  # 676 words, each once
ITEM = re.compile(r" Now (\w+) has (\d+)\.| What has (\w+)\? It is (\d+)\.")


def settings(**changes: Any) -> Recall:
    values = {"documents": 3, "words": 400, "spacing": 8, "reach": 100, "patterns": [PATTERN], "avoid": ["aarst"]}
    return Recall.model_validate(values | changes)


def distances(document: str, reach: int) -> list[int]:
    """Words of text from each question back to its fact, every question checked to be about one told within reach."""
    told: dict[str, tuple[int, str]] = {}
    found, words, end = [], 0, 0
    for item in ITEM.finditer(document):
        words += len(document[end : item.start()].split())
        end = item.end()
        key, value, asked, answer = item.groups()
        if key is not None:
            assert key not in told or words - told[key][0] > reach
            told[key] = (words, value)
        else:
            assert told[asked][1] == answer
            found.append(words - told[asked][0])
    return found


def test_every_question_is_about_one_fact_within_reach() -> None:
    documents = list(recall_documents([WORDS], settings()))
    assert len(documents) == 3
    back = [distance for document in documents for distance in distances(document, 100)]
    assert len(back) > 50
    assert 0 < min(back) < 25 < 75 < max(back) <= 100
    assert all("aarst has" not in document for document in documents)


def test_the_text_between_is_a_stretch_of_the_source() -> None:
    for document in recall_documents([WORDS], settings()):
        words = ITEM.sub("", document).split()
        assert len(words) == 400
        assert " ".join(words) in f"{WORDS}{WORDS}"  # it goes on at the start


def test_the_same_seed_gives_the_same_documents_and_another_one_others() -> None:
    first, again, other = (list(recall_documents([WORDS], settings(seed=seed))) for seed in (1, 1, 2))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": 677}, "a recall document takes 677 words, the text has 676"),
        ({"keys": 26}, "recall with reach 100 and spacing 8 needs 27 keys, the text and keys = 26 give 26"),
    ],
)
def test_a_text_that_is_too_small_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(recall_documents([WORDS], settings(**changes)))


def test_a_stage_trains_on_its_own_sources(tmp_path: Path) -> None:
    make_world(tmp_path)
    (tmp_path / "long.txt").write_text(tiny.text(300))
    recall = settings(spacing=100, keys=50, avoid=[]).model_dump()
    own = [{"text": str(tmp_path / "long.txt"), "recall": recall}]
    stages = [{"name": "short", "kind": "ce"}, {"name": "long", "kind": "ce", "sequence_length": 48, "sources": own}]
    values = recipe_values(tmp_path, *stages)
    recipe = parse_recipe(values)
    whole, long = (pack(recipe.data_of(stage), byte_tokenizer()) for stage in recipe.stages)
    text = byte_tokenizer().decode(long.tokens.tolist())
    assert "Now" not in byte_tokenizer().decode(whole.tokens.tolist())
    assert text.count("</s>") == 3
    assert len(ITEM.findall(text)) >= 9
    run_recipe(recipe, console=quiet())
    assert [row["stage"] for row in logged(tmp_path)] == ["short"] * 3 + ["long"] * 3

    write_text(tmp_path / "long.txt", repeat=90)
    (tmp_path / "run" / "long" / "model").rename(tmp_path / "unfinished")
    with pytest.raises(UserError, match=r"the data of output directory '.*run' have changed"):
        run_recipe(recipe, resume=True, console=quiet())
