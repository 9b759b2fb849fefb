"""Benchmark of choosing a token without a GPU: FlashInfer is its argument forms over PyTorch, the clocks are replaced,
everything else is real.
"""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import sampling, timing
from bench.contest import Roofs
from bench.peers import Missing
from bench.peers import sampling as peers

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
CASES = {name: replace(sampling.CASES[f"{name}-16"], V=640) for name in ("greedy", "temperature", "top-k", "top-p")}
CASES["both"] = replace(sampling.CASES["top-k-top-p-16"], V=640)
imported = peers.imported


def softmax(logits, temperature=None):
    return (logits.float() / temperature).softmax(-1)


def sampling_from_probs(probs, *, seed, offset, top_k=None, top_p=None):
    assert (probs.dtype, probs.is_contiguous()) == (torch.float32, True)
    for numbers in (seed, offset):
        assert (numbers.dtype, numbers.shape, numbers.is_contiguous()) == (torch.int64, (1,), True)
    probs, order = probs.sort(descending=True)
    if top_k is not None:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p is not None:
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    generator = torch.Generator().manual_seed(int(seed) + int(offset))
    return order.gather(1, probs.multinomial(1, generator=generator))[:, 0].int()


def top_k_sampling_from_probs(probs, top_k, *, seed, offset):
    assert isinstance(top_k, int)
    return sampling_from_probs(probs, seed=seed, offset=offset, top_k=top_k)


def top_p_sampling_from_probs(probs, top_p, *, seed, offset):
    return sampling_from_probs(probs, seed=seed, offset=offset, top_p=top_p)


def top_k_top_p_sampling_from_probs(probs, top_k, top_p, *, seed, offset):
    return sampling_from_probs(probs, seed=seed, offset=offset, top_k=top_k, top_p=top_p)


def sampling_from_logits(logits, *, seed, offset):
    assert logits.dtype == torch.float32
    return sampling_from_probs(logits.softmax(-1), seed=seed, offset=offset)


def top_k_top_p_sampling_from_logits(logits, top_k, top_p, *, seed, offset):
    assert logits.dtype == torch.float32
    return top_k_top_p_sampling_from_probs(logits.softmax(-1), top_k, top_p, seed=seed, offset=offset)


def top_k(input, k):
    return input.topk(k)


FLASHINFER = (
    *(softmax, sampling_from_probs, top_k_sampling_from_probs, top_p_sampling_from_probs),
    *(top_k_top_p_sampling_from_probs, sampling_from_logits, top_k_top_p_sampling_from_logits),
)
LIBRARY = {("flashinfer.sampling", function.__name__): function for function in FLASHINFER}
LIBRARY["flashinfer.topk", "top_k"] = top_k


def library(module, name):
    return LIBRARY[module, name] if module.startswith("flashinfer") else imported(module, name)


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers; gives the inputs that were timed, by name."""
    tokens = {}

    def rotate(calls, seconds):
        tokens.update({name: call() for name, call in calls.items()})
        return {name: {"us": 40.0, "graph_us": 10.0 if name == "reference" else 15.0} for name in calls}

    monkeypatch.setattr(timing, "rotate", rotate)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 0)
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(sampling, "draw", partial(sampling.draw, device="cpu"))
    return tokens


def rows(case, chosen_peers=(), backends=("reference",)):
    return json.loads(json.dumps(list(sampling.run(case, list(backends), list(chosen_peers), ROOFS))))


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("greedy", {"flashinfer_probs"}),
        ("temperature", set()),
        ("top-k", set()),
        ("top-p", {"flashinfer_logits"}),
        ("both", set()),
    ],
)
def test_everybody_draws_from_the_same_distribution(on_cpu, monkeypatch, kind, absent):
    monkeypatch.setattr(peers, "imported", library)
    case = CASES[kind]
    (row,) = rows(case, sampling.PEERS)
    assert (row["backend"], row["pass"], row["shape"]) == ("reference", "decode", {"B": 16, "V": 640})
    assert row["sampling"] == {"temperature": case.temperature, "top_k": case.top_k, "top_p": case.top_p}
    assert (row["mode"], row["ratio"]) == ("graph", pytest.approx(1.5))
    assert {name for name, entry in row["peers"].items() if "missing" in entry} == absent
    for entry in (row, *(row["peers"][name] for name in set(sampling.PEERS) - absent)):
        assert entry["errors"]["outside"] == 0
        assert entry["error"] <= sampling.MAX_ERROR
    assert {len(tokens) for tokens in on_cpu.values()} == {16}


def test_one_sequence_is_checked_too(on_cpu):
    (row,) = rows(replace(CASES["both"], B=1), ["transformers"])
    assert row["peers"]["transformers"]["errors"]["outside"] == 0


def test_libraries_that_are_not_there_are_missing(on_cpu, monkeypatch):
    def absent(module, name):
        raise Missing(f"not installed: {module}")

    monkeypatch.setattr(peers, "imported", absent)
    for kind, entries in (("greedy", {"flashinfer_logits"}), ("both", set(sampling.PEERS))):
        (row,) = rows(CASES[kind], entries)
        for name in entries:
            assert row["peers"][name]["missing"].startswith("not installed: ")
        assert row["best_peer"] is None


WRONG = {
    "the likeliest alone": ("temperature", {"temperature": 0.0}, "shares"),
    "another temperature": ("temperature", {"temperature": 0.8}, "shares"),
    "no top_k": ("top-k", {"top_k": None}, "outside"),
    "no top_p": ("top-p", {"top_p": None}, "shares"),
    "too much of top_p": ("top-p", {"top_p": 0.95}, "outside"),
    "too little of top_p": ("both", {"top_p": 0.8}, "shares"),
    "top_p of all": ("both", {"top_k": None}, "outside"),
}


@pytest.mark.parametrize(("kind", "changes", "wrong"), WRONG.values(), ids=WRONG)
def test_a_wrong_sampler_is_refused(on_cpu, monkeypatch, kind, changes, wrong):
    right, case = sampling.OURS["reference"], CASES[kind]

    def form(inputs):
        return right(replace(inputs, sampling=replace(inputs.sampling, **changes)))

    monkeypatch.setitem(peers.FORMS, "transformers", form)
    (row,) = rows(case, ["transformers"])
    assert row["peers"]["transformers"]["missing"].startswith("disagrees with float64")
    monkeypatch.setitem(sampling.OURS, "reference", form)
    with pytest.raises(AssertionError, match=rf"{case.name}: error .* of {wrong}"):
        rows(case)


def test_a_single_draw_of_what_is_cut_is_wrong(on_cpu, monkeypatch):
    right, case = sampling.OURS["reference"], CASES["top-k"]
    stray = int(sampling.exact_probabilities(sampling.check_logits(case), case).argmin())

    def almost_right(inputs):
        call, calls = right(inputs), []

        def once_wrong():
            tokens = call()
            if not calls:
                tokens[3] = stray
            calls.append(tokens)
            return tokens

        return once_wrong

    monkeypatch.setitem(sampling.OURS, "reference", almost_right)
    with pytest.raises(AssertionError, match="of outside"):
        rows(case)


def test_every_call_of_flashinfer_has_random_numbers_of_its_own():
    numbers = peers._random_numbers(torch.device("cpu"))
    offsets = [int(numbers()["offset"]) for _ in range(sampling.DRAWS)]
    assert len(set(offsets)) == sampling.DRAWS


def test_cuts_of_the_check_are_clear():
    """At the vocabulary of the cases: next to a cut no two classes are equal, and no rounding of a sum moves it."""
    for kind, kept in (("top-k", 50), ("top-p", 40), ("top-k-top-p", 25)):
        case = sampling.CASES[f"{kind}-1"]
        logits = sampling.check_logits(case)
        assert logits.sort().values.diff()[-60:].min() >= sampling.STEP
        probabilities = sampling.exact_probabilities(logits, case)
        assert int((probabilities > 0).sum()) == kept
        if case.top_p is not None:
            widest = replace(case, top_p=None)
            sums = sampling.exact_probabilities(logits, widest).sort(descending=True).values.cumsum(-1)
            assert (sums - case.top_p).abs().min() > 1e-4


def test_bins_are_of_about_equal_mass():
    for kind in ("temperature", "top-k", "top-p", "top-k-top-p"):
        case = sampling.CASES[f"{kind}-1"]
        probabilities = sampling.exact_probabilities(sampling.check_logits(case), case)
        bins = sampling.bins_of(probabilities)
        exact = sampling.exact_shares(probabilities, bins)
        assert exact["shares"].sum().item() == pytest.approx(1)
        assert exact["outside"].item() == 0
        assert 0.07 < exact["shares"].min() < exact["shares"].max() < 0.18
        assert torch.equal(bins == sampling.BINS, probabilities == 0)


def test_exact_probabilities_by_hand():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0]).log()  # of 6: 0, 3, 1, 2
    case = replace(CASES["temperature"], V=4, temperature=1.0)
    for changes, expected in (
        ({}, [0, 3 / 6, 1 / 6, 2 / 6]),
        ({"temperature": 0.5}, [0, 9 / 14, 1 / 14, 4 / 14]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 3 / 5, 0, 2 / 5]),
        ({"top_p": 0.55}, [0, 3 / 5, 0, 2 / 5]),
        ({"top_p": 0.45}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),
    ):
        probabilities = sampling.exact_probabilities(logits, replace(case, **changes))
        torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float64))


def test_the_cases_and_their_work():
    kinds = {(case.temperature, case.top_k, case.top_p) for case in sampling.CASES.values()}
    assert kinds == {(0.0, None, None), (0.7, None, None), (0.7, 50, None), (0.7, None, 0.9), (0.7, 50, 0.9)}
    assert {(case.B, case.V) for case in sampling.CASES.values()} == {(B, 128256) for B in (1, 16, 64)}
    assert len(sampling.CASES) == 15
    work = sampling.work(sampling.CASES["greedy-64"])
    assert (work.bytes, work.flop) == (64 * (2 * 128256 + 8), 64 * 128256)
    assert sampling.work(sampling.CASES["top-p-1"]).flop == 4 * 128256
