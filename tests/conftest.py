"""Fixtures that several files share. `hylo` is imported inside them, so that the operators' tests run without it."""

import pytest


@pytest.fixture(scope="module")
def corpus():
    """The quickstart's text: the standard library of this Python."""
    from hylo.quickstart.corpus import load_corpus

    return load_corpus()


@pytest.fixture(scope="module")
def tokenizer():
    """The tokenizer of the quickstart's bundled teacher."""
    from transformers import AutoTokenizer

    from hylo.quickstart.run import TEACHER

    return AutoTokenizer.from_pretrained(TEACHER)
