"""The Triton backend of sample_tokens in the interpreter."""

import pytest
import torch

from hylo_ops import sample_tokens
from hylo_ops.sampling import triton_decode
from tests.ops.sampling_cases import CASES, check

DRAWS = 60  # the interpreter takes up to 200 ms for a row
FEW = [case for case in CASES if case.V < 300 or case.top_p == 0.8]


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch):
    """So that each has several numbers."""
    monkeypatch.setattr(triton_decode, "_LANES", 128)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_draws_follow_the_probabilities(case):
    logits = case.logits()
    generator = torch.Generator().manual_seed(0)
    check(sample_tokens(logits.expand(DRAWS, -1), **case.options, generator=generator, backend="triton"), logits, case)


@pytest.mark.parametrize("V", [1, 50, 128, 129, 700])
def test_the_likeliest_is_the_first_of_equals(V):
    logits = torch.randn(5, V)
    likeliest = torch.randint(V, (5, 3))
    logits.scatter_(1, likeliest, 9.0)
    assert torch.equal(sample_tokens(logits, temperature=0, backend="triton"), likeliest.amin(-1))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("case", [case for case in CASES if case.V in (50, 64)], ids=lambda case: case.name)
def test_the_ends_of_the_numbers_draw_what_is_left(case, uniform):
    logits = case.logits()
    token = triton_decode.forward(logits[None], torch.full((1, 63), uniform), *case.options.values())
    assert logits[token[0]] > -torch.inf


def test_who_is_never_lucky_gets_the_likeliest():
    """Of two draws both are of what is cut: low numbers draw the unlikely, in this order of classes."""
    logits = torch.cat([torch.zeros(100), torch.tensor([4.0])])[None]
    token = triton_decode.forward(logits, torch.tensor([[0.0, 0.0, 0.0]]), 1.0, None, 0.01)
    assert token.tolist() == [100]


def test_strided_rows():
    wide = torch.randn(6, 300).to(torch.bfloat16)
    rows = wide[::2, 8:208]
    assert torch.equal(sample_tokens(rows, temperature=0, backend="triton"), rows.float().argmax(-1))
    assert torch.equal(sample_tokens(rows, top_k=1, backend="triton"), rows.float().argmax(-1))
