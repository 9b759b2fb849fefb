"""sample_tokens on the CPU: the reference's distribution, what it refuses, and that the op is one for torch."""

import pytest
import torch

from hylo_ops import sample_tokens
from hylo_ops.sampling import op
from tests.ops.sampling_cases import CASES, Case, check

DRAWS = 20_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_draws_follow_the_probabilities(case):
    logits = case.logits()
    tokens = sample_tokens(
        logits.expand(DRAWS, -1), **case.options, generator=torch.Generator().manual_seed(0), backend="reference"
    )
    assert (tokens.shape, tokens.dtype) == ((DRAWS,), torch.int64)
    check(tokens, logits, case)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_numbers_draw_what_is_left(uniform):
    """Whatever rounding makes of the last sum."""
    for case in CASES:
        logits = case.logits()[None]
        uniforms = torch.full((1, 63), uniform)
        check_left = torch.ops.hylo_ops.sample_tokens(logits, uniforms, case.temperature, case.top_k, case.top_p, None)
        assert logits[0, check_left[0]] > -torch.inf


def test_the_likeliest_is_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf], [-torch.inf, -torch.inf, -torch.inf, -2.0]])
    for top_k, top_p in ((None, None), (2, 0.5)):
        assert sample_tokens(logits, temperature=0, top_k=top_k, top_p=top_p).tolist() == [1, 3]


def test_the_generator_decides():
    logits = Case(700).logits().expand(50, -1)
    draws = [sample_tokens(logits, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_strided_rows_and_no_rows():
    wide = torch.randn(6, 40)
    assert torch.equal(sample_tokens(wide[::2, 3:20], temperature=0), wide[::2, 3:20].argmax(-1))
    assert sample_tokens(wide[:0]).shape == (0,)


def test_float64_stays_float64():
    """Logits that are equal in fp32."""
    logits = torch.tensor([[0.0, 1e-12]], dtype=torch.float64)
    assert sample_tokens(logits, temperature=1e-14).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must have shape \[B, V\], got \[3\]"),
        ({"logits": torch.zeros(3, 0)}, r"logits must have a vocabulary, got \[3, 0\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "logits must be bfloat16 or .*, got int64"),
        ({"temperature": -0.5}, "temperature must be a number from 0 on, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 on, got nan"),
        ({"temperature": float("inf")}, "temperature must be a number from 0 on, got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
    ],
)
def test_wrong_inputs_are_quoted(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_tokens(**{"logits": torch.zeros(2, 5), **arguments})


def test_opcheck():
    logits = torch.randn(3, 11)
    for options in ((0.0, None, None), (0.8, 4, None), (1.0, 4, 0.7)):
        torch.library.opcheck(torch.ops.hylo_ops.sample_tokens.default, (logits, torch.rand(3, 63), *options, None))


def test_numbers_are_drawn_once_in_a_compiled_graph():
    compiled = torch.compile(sample_tokens, backend="aot_eager", fullgraph=True)
    tokens = compiled(torch.randn(5, 40), temperature=0.7, top_p=0.9)
    assert ((tokens >= 0) & (tokens < 40)).all()


def test_backends_in_order():
    assert [backend.name for backend in op.BACKENDS] == ["triton", "reference"]
