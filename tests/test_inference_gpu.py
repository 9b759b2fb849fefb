"""The engine on a GPU: a graph gives what eager steps give, at every batch, from the fused ops, without waiting."""

import copy
from functools import partial

import pytest
import torch

import hylo
from hylo.inference import GREEDY, Engine, Sampling
from hylo_ops.testing import within_budget
from tests.test_inference import LENGTHS, check_greedy, logits_over_steps, one_pass_logits, prompts
from tests.test_model import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DIMS = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "linear_num_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
LAYOUTS = {"gdn": ["mla", "gated_deltanet", "mla", "gated_deltanet"], "mamba2": ["mamba2", "mla", "mamba2"]}


def model_of(layout, dtype=torch.bfloat16, **changes):
    """Widths that the fast kernels take."""
    torch.manual_seed(0)
    mixers = LAYOUTS[layout]
    config = hylo.HyloConfig(**DIMS | changes, num_hidden_layers=len(mixers), mixer_types=mixers)
    return hylo.HyloForCausalLM(config).to("cuda", dtype).eval()


def ids_of(length, seed=0):
    return torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
def test_tokens_are_the_cpus(layout):
    """float64 on both: no near tie that rounding could turn. Its ops are no fast kernels, and steps are eager."""
    model = make_model(layout)
    expected = Engine(copy.deepcopy(model), batch=3, capacity=32, chunk=4).generate(prompts(*LENGTHS), max_new_tokens=8)
    engine = Engine(model.cuda(), batch=3, capacity=32, chunk=4, graph=False)
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8) == expected


@pytest.mark.parametrize("batch", [1, 2, 16, 64])
@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_a_graph_gives_what_eager_steps_give(layout, batch):
    """The same kernels on the same numbers: the same bits, over replays of a graph and over a second run of it."""
    model = model_of(layout)
    given = [ids_of(5 + 3 * (n % 7), seed=n) for n in range(batch)]
    engines = [Engine(model, batch=batch, capacity=64, chunk=16, graph=graph) for graph in (False, True)]
    for _ in range(2):
        eager, graphed = (engine.generate(given, max_new_tokens=12) for engine in engines)
        assert graphed == eager
        assert torch.equal(*(engine.logits for engine in engines))
        assert torch.equal(*(engine.pools.recurrent for engine in engines))
    assert [type(step.graph) for step in engines[1]._graphs.values()] == 2 * [torch.cuda.CUDAGraph]


def test_one_engine_keeps_graphs_of_several_batches():
    model = model_of("gdn")
    engine = Engine(model, batch=4, capacity=64)
    alone = [engine.generate([ids_of(9, seed=n)], max_new_tokens=6) for n in range(4)]
    together = engine.generate([ids_of(9, seed=n) for n in range(4)], max_new_tokens=6)
    again = [engine.generate([ids_of(9, seed=n)], max_new_tokens=6) for n in range(4)]
    assert again == alone
    assert len(together) == 4
    assert set(engine._graphs) == {(count, GREEDY, turn) for count in (1, 4) for turn in (0, 1)}


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.8, top_k=40), Sampling(1.0, top_k=100, top_p=0.9), Sampling(1.0, top_p=0.7)]
)
def test_draws_in_a_graph_follow_the_seed(sampling):
    engine = Engine(model_of("gdn"), batch=2, capacity=64)
    draw = partial(engine.generate, [ids_of(9), ids_of(9)], max_new_tokens=30, sampling=sampling)
    first = draw(seed=0)  # its first step is eager, and so is not a replay as the same step of the next runs
    assert draw(seed=0) == draw(seed=0)
    assert draw(seed=1) != first
    assert first[0] != first[1]
    assert len(set(first[0])) > 10


@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision_errs_no_more_than_the_model(layout, qk_norm):
    """Logits after chunked prefill and after graphed steps: at most twice the error of one bf16 pass, by float64."""
    model = model_of(layout, qk_norm=qk_norm)
    exact = copy.deepcopy(model).double()
    given = [ids_of(300, seed=n) for n in range(3)]
    new = Engine(copy.deepcopy(model), batch=3, capacity=400, chunk=128).generate(given, max_new_tokens=8)
    expected, one_pass = one_pass_logits((exact, model), given, new)
    engine = Engine(copy.deepcopy(model), batch=3, capacity=400, chunk=128)
    within_budget(logits_over_steps(engine, given, new), one_pass, expected)


def test_greedy_takes_the_first_of_the_likeliest():
    check_greedy("cuda")


def test_tokens_that_travel_slowly_are_those_of_their_step(monkeypatch):
    engine = Engine(model_of("gdn"), capacity=64)
    expected = engine.generate([ids_of(9)], max_new_tokens=12)
    courier = engine._tokens._courier
    wait_for = courier.wait_stream

    def wait_long(stream):
        wait_for(stream)
        with torch.cuda.stream(courier):
            torch.cuda._sleep(10**8)  # clocks: longer than a step

    monkeypatch.setattr(courier, "wait_stream", wait_long)
    assert engine.generate([ids_of(9)], max_new_tokens=12) == expected
    assert len(set(expected[0])) > 1


def test_a_step_waits_for_nothing():
    engine = Engine(model_of("gdn"), batch=2, capacity=64)
    engine.generate([ids_of(9), ids_of(5)], max_new_tokens=4)
    engine.prefill([ids_of(9), ids_of(5)])
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._step(2, GREEDY, 0)
        engine._advance(2, GREEDY, 1)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_what_prefill_takes_does_not_grow_with_the_prompt(layout):
    engine = Engine(model_of(layout), capacity=2**17, chunk=1024)
    taken = []
    for length in (2**14, 2**16):
        engine.prefill([ids_of(4096)])
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.prefill([ids_of(length)])
        taken.append(torch.cuda.max_memory_allocated() - before)
    # One slice of the latents is larger in the longer prompt, up to 32768 tokens: 4 heads of 128 numbers.
    assert taken[1] <= taken[0] + 2 * 2**15 * 4 * 128 * 2


def test_two_million_tokens():
    """Filled caches beyond 2^31 bytes: the last row is written, and the step's result is that of a graph as well."""
    capacity = 2**21
    engines = [Engine(model_of("gdn", kv_lora_rank=512), capacity=capacity, graph=graph) for graph in (False, True)]
    assert engines[0].pools.rows[0].nbytes > 2**31
    for engine in engines:
        engine.fill(capacity - 8)
        engine.pools.rows[:, 0, -8:] = torch.nan
        assert len(list(engine.decode(8))) == 8
        assert torch.isfinite(engine.pools.rows[:, 0, -8:-1]).all()
        assert torch.isfinite(engine.logits).all()
    assert torch.equal(*(engine.logits for engine in engines))


def test_one_step_is_few_launches():
    """6 for a layer of Gated DeltaNet, 8 for one of MLA, some 15 around them; each product is one, and the head's."""
    engine = Engine(model_of("gdn"), capacity=64)
    engine.generate([ids_of(9)], max_new_tokens=4)
    engine.prefill([ids_of(9)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine._step(1, GREEDY, 0)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(launches) <= 85, launches
    assert not any("causal_conv1d" in name for name in launches), launches
    assert sum(name.startswith("rms_norm") for name in launches) == 1, launches  # the head's
    assert sum("mla_step" in name for name in launches) == 2 * 2, launches
    assert sum("skinny_linear" in name for name in launches) == 2 * (2 + 2) + 2 * (3 + 2) + 1, launches
