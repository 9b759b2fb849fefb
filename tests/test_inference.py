"""The engine: the tokens of generate(), from any chunking; sampling; ends; caches that stay where they are."""

import copy

import pytest
import torch

from hylo.errors import UserError
from hylo.inference import GREEDY, Engine, Sampling
from hylo.inference.sampling import sample
from hylo_ops import fused
from hylo_ops.testing import within_budget
from tests.test_model import make_config, make_model, tokens

LENGTHS = (9, 1, 14)


def prompts(*lengths):
    return [tokens(1, length, seed=length)[0] for length in lengths]


def engine_of(model, **options):
    return Engine(model, **({"batch": 3, "capacity": 32, "chunk": 4} | options))


def generated(model, prompt, new=8, **options):
    ids = prompt[None]
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
    return found[0, len(prompt) :].tolist()


def one_pass_logits(models, given, new):
    """Logits of the last token of each prompt and of the new ones behind it, as `logits_over_steps` has them."""
    whole = [torch.cat([prompt, torch.tensor(more)])[None] for prompt, more in zip(given, new, strict=True)]
    kept = {"logits_to_keep": 1 + len(new[0]), "use_cache": False}
    with torch.no_grad():
        for model in models:
            yield torch.cat([model(ids.to(model.device), **kept).logits for ids in whole]).transpose(0, 1)


def logits_over_steps(engine, given, new):
    """[1 + steps, prompts, vocabulary]: after the prompts, and after each step with the tokens of `new`."""
    engine.prefill(given)
    found = [engine.logits.clone()]
    for turn, tokens_of_all in enumerate(zip(*new, strict=True)):
        engine._tokens.row(turn).copy_(torch.tensor(tokens_of_all))
        engine._advance(len(given), GREEDY, turn + 1)
        found.append(engine.logits.clone())
    return torch.stack(found)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla", "linear"])
def test_tokens_are_those_of_generate(layout, qk_norm):
    """Prompts of different lengths in one batch, each as if it were alone; whatever the chunk."""
    model = make_model(layout, qk_norm=qk_norm)
    expected = [generated(model, prompt) for prompt in prompts(*LENGTHS)]
    assert len({tuple(sequence) for sequence in expected}) > 1
    for chunk in (1, 4, 9, 100):
        found = engine_of(model, chunk=chunk).generate(prompts(*LENGTHS), max_new_tokens=8)
        assert found == expected, f"chunk {chunk}"


def test_an_engine_begins_anew_each_time():
    model = make_model()
    engine = engine_of(model)
    first = engine.generate(prompts(*LENGTHS), max_new_tokens=8)
    engine.fill(20, sequences=3)
    engine.pools.rows.fill_(torch.nan)  # beyond a length nothing counts
    alone = engine.generate(prompts(14), max_new_tokens=8)
    assert alone == first[2:]
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8) == first


def test_a_step_changes_nothing_of_other_sequences():
    engine = engine_of(make_model("mamba2"))
    engine.pools.rows.zero_()  # what is beyond a length is whatever memory held, and a NaN is not equal to itself
    engine.prefill(prompts(*LENGTHS))
    before = [t.clone() for t in (engine.pools.rows[:, 1:], engine.pools.layers[1].recurrent)]
    engine.prefill(prompts(9))
    for _ in engine.decode(5):
        pass
    assert engine.lengths == [13]
    assert engine.pools.rows[:, 1:].equal(before[0])
    assert before[1].any()


@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
def test_any_chunking_errs_no_more_than_one_pass(layout):
    """float32 logits after prefill in chunks and after each of 7 steps, three prompts; one pass in float32, float64."""
    exact = make_model(layout)
    model = copy.deepcopy(exact).float()
    given = prompts(80, 85, 90)
    new = engine_of(copy.deepcopy(model), capacity=100).generate(given, max_new_tokens=7)
    expected, one_pass = one_pass_logits((exact, model), given, new)
    for chunk in (1, 7, 32, 90):
        engine = engine_of(copy.deepcopy(model), capacity=100, chunk=chunk)
        within_budget(logits_over_steps(engine, given, new), one_pass, expected, f"chunk {chunk}")


def test_graphs_are_captured_after_the_first_step(monkeypatch):
    """Two for each number of sequences and sampling; the policy alone, with eager steps for graphs."""
    engine, captured, replayed = engine_of(make_model()), [], []

    class Graph:
        def __init__(self, *key):
            captured.append(key)
            self.key = key

        def replay(self):
            replayed.append(self.key)
            return engine._step(*self.key)

    expected = engine.generate(prompts(*LENGTHS), max_new_tokens=8)
    engine.graph = True
    engine._loaded.clear()
    monkeypatch.setattr(engine, "_captured", Graph)
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8) == expected
    assert captured == [(3, GREEDY, 0), (3, GREEDY, 1)]
    assert replayed == [(3, GREEDY, 0), (3, GREEDY, 1)] * 3
    assert engine.generate(prompts(14), max_new_tokens=8) == expected[2:]
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8) == expected
    assert captured[2:] == [(1, GREEDY, 0), (1, GREEDY, 1)]
    assert replayed[6:12] == [(1, GREEDY, 0), (1, GREEDY, 1)] * 3
    assert replayed[12:] == [(3, GREEDY, turn % 2) for turn in range(1, 8)]


@pytest.mark.parametrize(("layout", "name"), [("gdn", "gated_delta_rule_step"), ("mamba2", "mamba2_step")])
def test_states_are_settled_in_the_engines_steps_alone(monkeypatch, layout, name):
    """`generate` of transformers runs the same layers and promises nothing."""
    model, said, original = make_model(layout), [], getattr(fused, name)

    def noted(*args, **options):
        said.append(options["settled_state"])
        return original(*args, **options)

    monkeypatch.setattr(fused, name, noted)
    for promised in (False, True):
        said.clear()
        if promised:
            engine_of(model).generate(prompts(5), max_new_tokens=3)
        else:
            generated(model, prompts(5)[0], new=3)
        assert set(said) == {promised}


def test_logits_are_made_for_the_last_token_alone():
    model = make_model()
    engine, made = engine_of(model), []
    model.lm_head.register_forward_pre_hook(lambda _, args: made.append(args[0].shape))
    engine.prefill(prompts(*LENGTHS))
    assert made == [(3, model.config.hidden_size)]


def test_no_layer_sees_more_than_a_chunk():
    model = make_model()
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    engine_of(model).prefill(prompts(14))
    assert seen == [4] * 4 * 3 + [2] * 4


def test_caches_stay_where_they_are():
    engine = engine_of(make_model("gdn", torch.float32, qk_norm=True))
    pools = engine.pools
    assert pools.rows.shape == (2, 3, 32, 16 + 4 + 2)
    assert pools.recurrent.dtype == torch.float32
    assert pools.row_bytes == 4 * 2 * 3 * 32 * 22
    assert pools.state_bytes == 4 * 2 * 3 * (2 * 8 * 16 + (2 * 2 * 8 + 2 * 16) * 4)
    places = [t.data_ptr() for t in (pools.rows, pools.conv, pools.recurrent)]
    engine.generate(prompts(*LENGTHS), max_new_tokens=8)
    assert places == [t.data_ptr() for t in (pools.rows, pools.conv, pools.recurrent)]


def test_half_precision_keeps_states_in_fp32():
    engine = engine_of(make_model("mamba2", torch.bfloat16))
    assert engine.pools.rows.dtype == engine.pools.conv.dtype == torch.bfloat16
    assert engine.pools.recurrent.dtype == torch.float32
    assert all(len(found) == 8 for found in engine.generate(prompts(*LENGTHS), max_new_tokens=8))


def test_each_sequence_ends_by_itself():
    model = make_model()
    whole = engine_of(model).generate(prompts(*LENGTHS), max_new_tokens=8)
    end = whole[0][2]
    cut = [s[: s.index(end) + 1] if end in s else s for s in whole]
    assert len({len(s) for s in cut}) > 1
    engine = engine_of(model)
    steps = list(engine.stream(prompts(*LENGTHS), max_new_tokens=8, end=end))
    assert [[step[n] for step in steps if step[n] is not None] for n in range(3)] == cut
    assert all(step[0] is None for step in steps[len(cut[0]) :])
    assert engine.generate(prompts(9), max_new_tokens=8, end=[end, 96]) == cut[:1]
    model.generation_config.eos_token_id = end
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8) == cut
    assert generated(model, prompts(9)[0], eos_token_id=end) == cut[0]
    assert engine.generate(prompts(*LENGTHS), max_new_tokens=8, end=()) == whole


def test_the_last_of_all_ends_stops_the_steps():
    model = make_model()
    (first,) = engine_of(model).generate(prompts(9), max_new_tokens=1)
    engine = engine_of(model)
    assert list(engine.stream(prompts(9), max_new_tokens=20, end=first)) == [first]
    assert engine.lengths == [10]  # the step that was on its way, and no other


def test_progress_counts_the_tokens_of_all_prompts():
    calls = []
    engine_of(make_model()).prefill(prompts(9, 3), progress=lambda *counts: calls.append(counts))
    assert calls == [(4, 12), (8, 12), (9, 12), (12, 12)]


def test_the_seed_decides_what_is_drawn():
    engine = engine_of(make_model())
    warm = Sampling(temperature=1.0, top_k=20, top_p=0.95)
    draws = [engine.generate(prompts(*LENGTHS), max_new_tokens=8, sampling=warm, seed=s) for s in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_draws_follow_the_probabilities():
    """Frequencies of 40,000 draws within 5 standard deviations; the restrictions cut where they say."""
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 1.5]]).repeat(40_000, 1)
    generator = torch.Generator().manual_seed(0)
    order = logits[0].argsort(descending=True).tolist()  # 0 4 2 1 3
    for sampling, kept in (
        (Sampling(1.0), 5),
        (Sampling(0.5), 5),
        (Sampling(2.0, top_k=3), 3),
        (Sampling(1.0, top_p=0.5), 2),  # 0.46, 0.28, ...
        (Sampling(1.0, top_p=0.4), 1),
        (Sampling(1.0, top_k=4, top_p=0.8), 3),
        (Sampling(1.0, top_k=50, top_p=1.0), 5),
    ):
        weights = (logits[0] / sampling.temperature).softmax(-1)
        weights[order[kept:]] = 0
        expected = weights / weights.sum()
        drawn = sample(logits, sampling, generator).bincount(minlength=5) / len(logits)
        assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / len(logits)).sqrt()).all(), sampling


def check_greedy(device):
    """The likeliest token, of several the first, in parts of any number."""
    for vocabulary in (1, 33, 50, 384, 128256):
        logits = torch.randn(7, vocabulary, device=device)
        for ties in (1, 5):
            likeliest = torch.randint(vocabulary, (7, ties), device=device)
            logits.scatter_(1, likeliest, 9.0)
            assert torch.equal(sample(logits, GREEDY, torch.Generator(device)), likeliest.amin(-1))
            logits.scatter_(1, likeliest, -9.0)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=1)])
def test_greedy_needs_no_luck(sampling):
    logits = torch.randn(7, 50)
    assert torch.equal(sample(logits, sampling, torch.Generator()), logits.argmax(-1))


def test_greedy_takes_the_first_of_the_likeliest():
    check_greedy("cpu")


def test_filled_caches_decode():
    engine = engine_of(make_model("mamba2", torch.float32))
    engine.fill(30, sequences=2)
    assert engine.lengths == [30, 30]
    found = list(engine.decode(2))
    assert len(found) == 2
    assert torch.isfinite(engine.logits).all()
    assert engine.pools.rows[:, :2, :30].std() == pytest.approx(1, abs=0.1)


def test_two_million_positions():
    """A filled cache whose rows pass 2^31 bytes: the last row is written and read, and no other."""
    capacity = 2**21
    model = make_model("mla", torch.bfloat16, num_hidden_layers=1, mixer_types=["mla"], kv_lora_rank=508)
    engine = Engine(model, capacity=capacity)
    assert engine.pools.rows.nbytes >= 2**31
    engine.pools.rows[0, 0, :-2].zero_()
    engine._begin([capacity - 2])
    list(engine.decode(2))
    assert engine.lengths == [capacity - 1]
    assert engine.pools.rows[0, 0, -2].any()
    assert torch.isfinite(engine.logits).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"capacity": -1}, "capacity must be at least 1, got -1"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"graph": True}, "needs a model on a CUDA device, got one on cpu"),
    ],
)
def test_rejected_engines(options, message):
    with pytest.raises(UserError, match=message):
        engine_of(make_model(), **options)


@pytest.mark.parametrize(
    ("given", "new", "message"),
    [
        ([], 1, "1 to 3 prompts, the engine's batch, got 0"),
        ([[1]] * 4, 1, "1 to 3 prompts, the engine's batch, got 4"),
        ([[1], []], 1, r"prompt 1 must be at least one token id, got \[\]"),
        ([[1.5]], 1, r"prompt 0 must be at least one token id, got \[1.5\]"),
        ([torch.ones(1, 2, dtype=torch.long)], 1, "prompt 0 must be at least one token id"),
        ([[1] * 30], 3, "30 tokens of prompt 0 and 3 new ones exceed the capacity of 32"),
        ([[1], [97]], 1, "the tokens of prompt 1 must be 0 to 96, got 97"),
        ([[-1]], 1, "the tokens of prompt 0 must be 0 to 96, got -1"),
        ([[1]], 0, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_rejected_prompts(given, new, message):
    with pytest.raises(UserError, match=message):
        engine_of(make_model()).stream(given, max_new_tokens=new)


def test_rejected_calls():
    engine = engine_of(make_model())
    with pytest.raises(UserError, match="call prefill or fill first"):
        engine.decode(1)
    with pytest.raises(UserError, match="length must be 1 to the capacity of 32, got 33"):
        engine.fill(33)
    with pytest.raises(UserError, match="sequences must be 1 to the batch of 3, got 4"):
        engine.fill(3, sequences=4)
    engine.fill(30)
    with pytest.raises(UserError, match="30 tokens and 3 new ones exceed the capacity of 32"):
        engine.decode(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0 on, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 on, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_k": 3}, "top_k and top_p need a temperature above 0, got 0.0"),
    ],
)
def test_rejected_sampling(options, message):
    with pytest.raises(UserError, match=message):
        Sampling(**options)


def test_a_layer_that_is_more_than_its_weight_is_refused():
    class Adapted(torch.nn.Linear):
        pass

    model = make_model("mla")
    model.model.layers[1].mixer.o_proj = Adapted(32, 32, bias=False)
    with pytest.raises(UserError, match=r"got model\.layers\.1\.mixer\.o_proj of type Adapted"):
        engine_of(model)


def test_memory_that_does_not_suffice_is_one_sentence(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("a page of text")

    model = make_model()
    engine = engine_of(model)
    monkeypatch.setattr(engine, "_read", full)
    with pytest.raises(UserError, match=r"^A chunk of 4 tokens needs more memory .* ask for a smaller chunk$"):
        engine.prefill(prompts(9))
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"^The caches of 3 sequences of 32 tokens need .* smaller batch or capacity$"):
        engine_of(model)


def test_a_config_names_its_end():
    """The end tokens of a hybrid's config reach the engine without a word."""
    config = make_config(eos_token_id=[5, 7])
    torch.manual_seed(0)
    model = type(make_model())(config)
    assert set(engine_of(model)._ends(None)) == {5, 7}
