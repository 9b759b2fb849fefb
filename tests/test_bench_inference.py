"""The inference benchmark at tiny dims on a CPU: both sides are the models they say, and what is counted is right."""

import json
import math

import pytest
import torch
from torch import nn

import hylo
from bench import inference
from bench.inference import Dense, Hybrid, check, longest, measure, parse, prefill_flop, prompt, rows_of, step_bytes
from hylo_ops.mla_prefill.sliced import _slices
from tests import tiny


def options_of(*more):
    return parse(["--chunk", "8", "--llama-chunk", "8", "--lengths", "20", "--fill", "40", "--new", "5", *more])


@pytest.fixture
def tiny_models(monkeypatch):
    made = {"Llama-6MLA22M2": lambda: tiny.hylo("mamba2"), "Llama-3.2-1B": tiny.llama}
    monkeypatch.setattr(inference, "build", lambda name, device: made[name]())


@pytest.mark.parametrize("make", [tiny.llama, tiny.hylo])
def test_tokens_are_those_of_generate(make):
    model = make()
    runner = inference.runner_of(model, options_of("--batch", "2"), 32)
    ids = prompt(model, 2, 19)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    for _ in range(2):  # nothing of the first run is left
        runner.prefill(ids)
        assert torch.tensor(list(runner.tokens(6))).T.equal(expected[:, 19:])


@pytest.mark.parametrize("make", [tiny.llama, tiny.hylo])
def test_a_wrong_cache_is_found(monkeypatch, make):
    model, options = make(), options_of()
    assert check(model, options, 8) < 1e-5
    kind = Hybrid if make is tiny.hylo else Dense
    original = kind.prefill
    monkeypatch.setattr(kind, "prefill", lambda self, ids: original(self, ids[:, 8:]))
    with pytest.raises(AssertionError, match="of one pass"):
        check(model, options, 8)


@pytest.mark.parametrize("name", ["Llama-6MLA22M2", "Llama-3.2-1B"])
def test_rows(tiny_models, name):
    options = options_of("--batch", "2")
    read, filled = rows_of(name, options, torch.device("cpu"))
    assert (read["context"], filled["context"]) == ("read", "filled")
    assert read["ttft_s"] > 0
    assert filled["ttft_s"] is None
    for row in (read, filled):
        assert row["tpot_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(2 / (row["tpot_ms"] / 1000))
    assert read["prefill_tflops"] == pytest.approx(read["prefill_flop"] / read["ttft_s"] / 1e12)


def shapes(length, chunk, slice_tokens):
    """Queries and keys of each block of a prompt, and whether it is causal."""
    found = set()
    for past in range(0, length, chunk):
        end = min(past + chunk, length)
        for first, last in _slices(past, end, slice_tokens):
            found |= {(last - first, last - first, True)} if first >= past else set()
            found.add((end - max(past, last), last - first, False))
    return {shape for shape in found if shape[0] > 0}


@pytest.mark.parametrize(("chunk", "slice_tokens"), [(8, 32), (8, 8), (32, 8), (6, 32), (20, 16)])
def test_the_opening_has_all_shapes_of_a_prompt(chunk, slice_tokens):
    period = math.lcm(chunk, slice_tokens)
    for length in range(1, 4 * period + 2 * chunk):
        opening = inference.opening(length, chunk, period)
        assert shapes(opening, chunk, slice_tokens) == shapes(length, chunk, slice_tokens), length
        assert opening <= length
        assert opening < 2 * period + chunk


@pytest.mark.parametrize(
    ("kind", "make", "opening"), [(Hybrid, tiny.hylo, 16 + 8 + 12), (Dense, tiny.llama, 8 + 8 + 4)]
)
def test_the_opening_is_read_before_the_clock_starts(monkeypatch, kind, make, opening):
    read, original = [], kind.prefill
    monkeypatch.setattr(kind, "prefill", lambda self, ids: (read.append(ids.shape[1]), original(self, ids))[1])
    monkeypatch.setattr(inference, "_SLICE", 16)
    row = inference.row_of(make(), options_of(), 100, filled=False)
    assert read == [opening, *[100] * row["rounds"]]


def test_what_does_not_fit_is_a_row(tiny_models, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.02 GiB. GPU 0 has\na page of text")

    monkeypatch.setattr(Dense, "fill", full)
    read, filled = rows_of("Llama-3.2-1B", options_of(), torch.device("cpu"))
    assert "failed" not in read
    assert filled["failed"] == "CUDA out of memory."


def test_a_stopped_run_keeps_its_rows(tiny_models, monkeypatch, tmp_path, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inference.record, "meta", lambda commit: {"commit": commit})
    monkeypatch.setattr(inference.timing, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(Dense, "fill", stopped)
    file = tmp_path / "inference.json"
    options = options_of("--models", "Llama-6MLA22M2", "Llama-3.2-1B", "--commit", "abc", "--out", str(file))
    with pytest.raises(KeyboardInterrupt):
        inference.run(options, torch.device("cpu"))
    result = json.loads(file.read_text())
    assert result["meta"] == {"commit": "abc", "copy_bytes_per_second": 3e12}
    found = [(row["model"], row["length"], row["context"]) for row in result["rows"]]
    assert found == [("Llama-6MLA22M2", 20, "read"), ("Llama-6MLA22M2", 40, "filled"), ("Llama-3.2-1B", 20, "read")]
    assert capsys.readouterr().out.splitlines() == [inference.line(row) for row in result["rows"]]


def test_a_row_is_printed_in_short():
    row = {"model": "Llama-3.2-1B", "batch": 64, "length": 8192, "context": "read", "parameters": 5}
    times = {"ttft_s": 1.2345, "tpot_ms": 2.3456, "step_tb_per_second": 1.888, "peak_gib": 3.777}
    start = "Llama-3.2-1B, 64 x 8192, read"
    assert inference.line(row | times) == f"{start}: ttft 1.234 s, tpot 2.346 ms, 1.89 TB/s, 3.78 GiB"
    assert inference.line(row | times | {"ttft_s": None}) == f"{start}: tpot 2.346 ms, 1.89 TB/s, 3.78 GiB"
    assert inference.line(row | {"failed": "CUDA out of memory."}) == f"{start}: CUDA out of memory."
    assert (
        inference.line(row | {"context": "longest cache that fits"})
        == "Llama-3.2-1B, 64 x 8192, longest cache that fits"
    )


def test_the_longest_cache_is_found():
    for most in (0, 8192, 3 * 8192, 131 * 8192 + 5):
        tried = []
        assert longest(lambda n, most=most, tried=tried: (tried.append(n), n <= most)[1]) == most // 8192 * 8192
        assert len(tried) <= 2 * math.log2(max(most, 8192) / 8192) + 3


@pytest.mark.parametrize("make", [tiny.llama, tiny.hylo, lambda: tiny.hylo("mamba2")])
def test_products_with_weights_are_all_counted(make):
    model = make()
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head)
    head = 2 * model.lm_head.weight.numel()
    once, twice = (prefill_flop(model.config, n) - head for n in (1, 2))
    quadratic = (twice - 2 * once) / 2
    recurrent = {"gated_deltanet": 6 * 2 * 8 * 16, "mamba2": 4 * 4 * 8 * 8}
    mixer = getattr(model.config, "mixer_types", ["none"])[0]
    assert once - quadratic == 2 * weights + recurrent.get(mixer, 0)


def test_attention_at_two_million_tokens_is_the_recipes():
    """162 and 378 PFLOP for 6 and 14 layers of MLA at 3B, 72 for 4 at 1B; products with 3B's weights about 14."""
    variants = hylo.published_variants()
    for name, attention in (("Llama-6MLA22M2", 162), ("Llama-14MLA14GDN", 378), ("Llama-4MLA12GDN", 72)):
        config, length = variants[name], 2**21
        quadratic = 2 * (prefill_flop(config, length) - 2 * prefill_flop(config, length // 2))
        assert quadratic / 1e15 == pytest.approx(attention, rel=0.01)
        if config.num_hidden_layers == 28:
            assert (prefill_flop(config, length) - quadratic) / 1e15 == pytest.approx(14, rel=0.1)


def test_bytes_of_a_step():
    model = tiny.hylo()
    runner = Hybrid(model, 3, 50, 8)
    embedding = model.model.embed_tokens.weight.nbytes
    weights = sum(p.nbytes for p in model.parameters()) - embedding
    states = 3 * (2 * 8 * 16 + (2 * 2 * 8 + 2 * 16) * 4)
    assert step_bytes(model, runner, 50, 20) == weights + 4 * 3 * 20 * 16 + 2 * 4 * states


def test_times_are_of_what_they_say(monkeypatch):
    clock = iter([10.0, 14.0, 14.5, 15.0, 15.5])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(clock))
    model = tiny.hylo()
    row = measure(Hybrid(model, 2, 50, 8), prompt(model, 2, 9), 9, 4, False)
    assert row["ttft_s"] == 4.0
    assert row["tpot_ms"] == 500.0
    assert row["tokens_per_second"] == 4.0
    assert row["rounds"] == 1  # one that takes so long is enough


def test_times_of_short_rounds_are_medians(monkeypatch):
    rounds = [(0.1, 0.01), (0.3, 0.02), (0.2, 0.06), (0.1, 0.01), (0.25, 0.01)]
    clock = iter([tick for first, each in rounds for tick in (0.0, *(first + each * n for n in range(4)))])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: next(clock))
    model = tiny.hylo()
    row = measure(Hybrid(model, 2, 50, 8), prompt(model, 2, 9), 9, 4, False)
    assert row["rounds"] == 4  # 0.13, 0.36, 0.38 and 0.13 are a second
    assert row["ttft_s"] == pytest.approx(0.15)
    assert row["tpot_ms"] == pytest.approx(15.0)


def test_rejected_options(capsys):
    with pytest.raises(SystemExit):
        parse(["--new", "1"])
    assert "--new must be at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["--lengths", "8192", "0"])
    assert "--lengths must be at least 1, got 0" in capsys.readouterr().err
