"""Fixtures that several files share. `hylo` is imported inside them, so that the operators' tests run without it."""

import multiprocessing
import os

# Before torch is imported. Of several processes (pytest -n) each has one core, and so have those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

LONGEST = ("test_gated_delta_rule_compiles.py", "test_triton.py")  # minutes each


def pytest_collection_modifyitems(items):
    """The longest files first, so that of several processes none is left alone with one."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@pytest.fixture(scope="session")
def forks():
    """A fork server that has imported what its children need; there is one, which the first child starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_resume", "tests.test_processes"])
    return context


@pytest.fixture
def without_nvrtc(monkeypatch):
    """On any device, whatever there is."""
    from hylo_ops import cubin

    monkeypatch.setattr(cubin, "why_not_device", lambda device: None)
    monkeypatch.setattr(cubin, "why_not_nvrtc", lambda: "NVRTC is not installed")
    cubin.why_not.cache_clear()
    yield
    cubin.why_not.cache_clear()
