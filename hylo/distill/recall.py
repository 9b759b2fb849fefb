"""Documents that train a model to look back: text in which facts are told, and asked for after a long while.

A text alone rarely rewards looking back tens of thousands of tokens; here every few lines do (docs/long-context.md).
"""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from hylo.distill.recipe import Pattern, Recall
from hylo.errors import UserError

_WORD = re.compile(r"\s*\S+")  # with the space before it, so that the pieces make up the text
_KEY = re.compile(r"\b[a-z]{4,}\b")


class _Fact(NamedTuple):
    position: int  # words of the text before it
    pattern: Pattern
    key: str
    value: str


def recall_documents(texts: Iterable[str], recall: Recall) -> Iterator[str]:
    """Yield `recall.documents` documents of `recall.words` words of the text each; equal arguments give equal ones.

    Raises:
        UserError: the text is shorter than one document, or has too few different words for the keys.
    """
    text = "".join(f"\n\n{one}" for one in texts)
    there = sum(1 for _ in islice(_WORD.finditer(text), recall.words))
    if there < recall.words:
        raise UserError(f"a recall document takes {recall.words} words, the text has {there}")
    keys = _keys(text, recall)
    for number in range(recall.documents):
        rng = random.Random(f"{recall.seed}/{number}")
        yield "".join(_interleaved(_stretch(text, recall.words, rng), keys, recall, rng)).lstrip()


def _stretch(text: str, count: int, rng: random.Random) -> list[str]:
    """So many words from a place drawn at random, going on at the start where the text ends."""
    start = max(0, text.find(" ", rng.randrange(len(text))))
    return [found.group() for found in islice(chain(_WORD.finditer(text, start), _WORD.finditer(text)), count)]


def _keys(text: str, recall: Recall) -> list[str]:
    """Words to tell facts about, frequent ones first."""
    avoided = set(recall.avoid)
    counts = Counter(_KEY.findall(text))
    keys = [word for word, _ in counts.most_common() if word not in avoided][: recall.keys]
    most = recall.reach // max(1, recall.spacing // 2) + 2  # facts within reach, if no question were drawn
    if len(keys) < most:
        raise UserError(
            f"recall with reach {recall.reach} and spacing {recall.spacing} needs {most} keys, the text and "
            f"keys = {recall.keys} give {len(keys)}"
        )
    return keys


def _interleaved(words: Sequence[str], keys: list[str], recall: Recall, rng: random.Random) -> Iterator[str]:
    """The words, with a fact or a question in every gap that is drawn."""
    facts: deque[_Fact] = deque()
    position = 0
    while position < len(words):
        gap = rng.randint(recall.spacing // 2, recall.spacing + recall.spacing // 2)
        yield from words[position : position + gap]
        position += gap
        while facts and facts[0].position < position - recall.reach:
            facts.popleft()
        if facts and rng.random() < 0.5:
            asked = rng.choice(facts)
            yield asked.pattern.question.format(key=asked.key, value=asked.value)
        else:
            facts.append(_new_fact(position, facts, keys, recall, rng))
            yield facts[-1].pattern.fact.format(key=facts[-1].key, value=facts[-1].value)


def _new_fact(position: int, facts: Iterable[_Fact], keys: list[str], recall: Recall, rng: random.Random) -> _Fact:
    taken = {fact.key for fact in facts}
    while (key := rng.choice(keys)) in taken:
        pass
    value = rng.randrange(10 ** (recall.digits - 1), 10**recall.digits)
    return _Fact(position, rng.choice(recall.patterns), key, str(value))
