"""The memory formulas on a GPU: within a tenth of what training steps at true dims take."""

import gc

import pytest
import torch

from bench.memory import CASES, row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("name", ["1b-align", "1b-8k", "1b-64k", "1b-64k-selective", "1b-64k-tiles", "m2-64k"])
def test_the_peak_of_a_step_is_the_formulas(name: str) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    found = row(name, CASES[name], torch.device("cuda"))
    assert found["peak_bytes"] is not None, "out of memory"
    assert found["ratio"] == pytest.approx(1, rel=0.1)
