"""sample_tokens on a GPU: the distribution, at the models' vocabulary too; graphs; nothing waits for the device."""

import dataclasses

import pytest
import torch

from hylo_ops import sample_tokens
from tests.ops.sampling_cases import CASES, CUTS, Case, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DRAWS = 40_000
LARGE = [Case(128256, *cuts) for cuts in CUTS] + [Case(151936, 0.6, 20, 0.95), Case(9000, 1.0, 8999, 0.999)]


def generator(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_draws_follow_the_probabilities(case):
    logits, numbers = case.logits(), generator()
    rows = logits.cuda().expand(500, -1)
    tokens = [sample_tokens(rows, **case.options, generator=numbers, backend="triton") for _ in range(DRAWS // 500)]
    check(torch.cat(tokens).cpu(), logits, case)


@pytest.mark.parametrize("V", [1, 33, 50, 384, 8192, 8193, 128256])
def test_the_likeliest_is_the_first_of_equals(V):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.randn(7, V, device="cuda").to(dtype)
        likeliest = torch.randint(V, (7, 5), device="cuda")
        logits.scatter_(1, likeliest, 9.0)
        assert torch.equal(sample_tokens(logits, temperature=0, backend="triton"), likeliest.amin(-1))


@pytest.mark.parametrize("case", [Case(128256, *cuts) for cuts in CUTS], ids=lambda case: case.name)
def test_the_same_numbers_give_the_same_tokens(case):
    logits = torch.randn(64, case.V, device="cuda").to(case.dtype)
    draws = [sample_tokens(logits, **case.options, generator=generator(i % 2)) for i in range(20)]
    assert all(torch.equal(tokens, draws[i % 2]) for i, tokens in enumerate(draws))
    assert not torch.equal(draws[0], draws[1])


def test_a_graph_draws_anew():
    case = Case(128256, 0.8, 50, 0.9)
    logits, numbers = torch.randn(16, case.V, device="cuda").bfloat16(), generator()
    sample_tokens(logits, **case.options, generator=numbers)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(numbers)
    with torch.cuda.graph(graph):
        tokens = sample_tokens(logits, **case.options, generator=numbers)
    seen = []
    for _ in range(8):
        graph.replay()
        seen.append(tokens.clone())
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_it_waits_for_nothing():
    logits = torch.randn(4, 128256, device="cuda")
    for cuts in CUTS:
        options = dataclasses.asdict(Case(128256, *cuts))
        arguments = {name: options[name] for name in ("temperature", "top_k", "top_p")}
        sample_tokens(logits, **arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample_tokens(logits, **arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rows_past_two_to_the_31():
    """Of one tensor: 4.3 GB."""
    logits = torch.full((17, 1 << 27), -1.0, dtype=torch.bfloat16, device="cuda")[:, -(1 << 21) :]
    places = torch.arange(17, device="cuda") * 1000
    logits.scatter_(1, places[:, None], 50.0)
    assert torch.equal(sample_tokens(logits, top_p=0.5, backend="triton"), places)
