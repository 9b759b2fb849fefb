"""Needle cases, both scorers against oracle, empty and blind readers, and a real model as a reader."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hylo.errors import UserError
from hylo.evaluate import CODE_NEEDLE, PROSE_NEEDLE, ModelReader, NeedleSettings, build_cases, needle_grid
from tests import tiny


class Oracle:
    """Reads the needle out of the prompt's own text."""

    def generate(self, case):
        words = tiny.tokenizer().decode(case.prompt).replace(".", " ").split()
        return " ".join(word for word in words if word.isdigit())

    def log_likelihoods(self, case):
        seen = self.generate(case)
        return torch.tensor([float(tiny.tokenizer().decode(c).strip() in seen) for c in case.candidates])


class Empty:
    """Says nothing and prefers nothing."""

    def generate(self, case):
        return ""

    def log_likelihoods(self, case):
        return torch.zeros(len(case.candidates))


class Blind:
    """Prefers high numbers, whatever it reads."""

    def generate(self, case):
        return "99999"

    def log_likelihoods(self, case):
        return torch.tensor([float(tiny.tokenizer().decode(c)) for c in case.candidates])


SETTINGS = NeedleSettings(lengths=(160, 320), depths=(0.0, 0.5, 1.0), repeats=2)


@pytest.mark.parametrize("template", [PROSE_NEEDLE, CODE_NEEDLE], ids=["prose", "code"])
def test_needle_cases(template):
    settings = NeedleSettings(lengths=(160, 320), depths=(0.0, 0.5, 1.0), repeats=3, template=template)
    cases = build_cases(tiny.tokenizer(), tiny.text(), settings)
    assert len(cases) == 2 * 3 * 3
    assert len({case.value for case in cases}) == len(cases)
    for case in cases:
        decoded = tiny.tokenizer().decode(case.prompt)
        assert len(case.prompt) == case.length
        assert case.prompt[0] == tiny.tokenizer().bos_token_id
        assert decoded.count(case.value) == 1
        assert abs(decoded.index(case.value) / len(decoded) - case.depth * 0.8) < 0.2
        answers = [tiny.tokenizer().decode(c) for c in case.candidates]
        assert answers[0] == f" {case.value}"
        assert len(set(answers)) == settings.distractors + 1


def test_needle_sits_between_sentences():
    case = build_cases(tiny.tokenizer(), tiny.text(), NeedleSettings(lengths=(400,), depths=(0.5,), repeats=1))[0]
    before = tiny.tokenizer().decode(case.prompt).split(" The secret number of")[0]
    assert before.endswith(".")


def test_needle_cases_depend_on_the_seed_only():
    first, again, other = (
        build_cases(tiny.tokenizer(), tiny.text(), NeedleSettings(lengths=(200,), seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert [c.value for c in first] != [c.value for c in other]


@pytest.mark.parametrize("mode", ["generation", "likelihood"])
def test_oracle_finds_every_needle_and_an_empty_model_none(mode):
    cases = build_cases(tiny.tokenizer(), tiny.text(), SETTINGS)
    oracle, empty = needle_grid(Oracle(), cases, mode), needle_grid(Empty(), cases, mode)
    assert oracle.scores == [[1.0, 1.0]] * 3
    assert oracle.mean == 1.0
    assert (oracle.depths, oracle.lengths, oracle.cases) == ([0.0, 0.5, 1.0], [160, 320], 12)
    assert empty.mean == pytest.approx(empty.chance)
    assert empty.chance == (0.0 if mode == "generation" else 0.1)


def test_a_blind_model_scores_chance():
    settings = NeedleSettings(lengths=(120,), depths=(0.5,), repeats=400, distractors=3)
    grid = needle_grid(Blind(), build_cases(tiny.tokenizer(), tiny.text(), settings), "likelihood")
    assert grid.chance == 0.25
    assert abs(grid.mean - grid.chance) < 4 * math.sqrt(0.25 * 0.75 / 400)
    assert needle_grid(Blind(), build_cases(tiny.tokenizer(), tiny.text(), SETTINGS), "generation").mean == 0


def check_candidate_scores(model) -> None:
    """Scores on one shared prefill equal those of each whole sequence on its own."""
    case = build_cases(tiny.tokenizer(), tiny.text(), NeedleSettings(lengths=(150,), depths=(0.3,), repeats=1))[0]
    case.candidates[1] = case.candidates[1][:2]  # candidates of different lengths
    expected = []
    for candidate in case.candidates:
        with torch.no_grad():
            logits = model(torch.tensor([case.prompt + candidate])).logits[0, len(case.prompt) - 1 : -1]
        expected.append(-cross_entropy(logits, torch.tensor(candidate), reduction="sum"))
    scores = ModelReader(model, tiny.tokenizer()).log_likelihoods(case)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_candidates_are_scored_as_whole_sequences(name):
    check_candidate_scores(tiny.MODELS[name]())


def test_model_generates_greedily():
    model = tiny.llama()
    model.generation_config.do_sample = True  # a checkpoint's own taste is not what is measured
    model.generation_config.temperature = 2.0
    case = build_cases(tiny.tokenizer(), tiny.text(), NeedleSettings(lengths=(150,), repeats=1))[0]
    reader = ModelReader(model, tiny.tokenizer(), max_new_tokens=5)
    ids = list(case.prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = ids[len(case.prompt) :]
    if 1 in expected:
        expected = expected[: expected.index(1)]
    assert reader.generate(case) == tiny.tokenizer().decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (NeedleSettings(lengths=()), "no lengths"),
        (NeedleSettings(lengths=(200,), depths=(0.5, 1.5)), "between 0 and 1, got 1.5"),
        (NeedleSettings(lengths=(200,), repeats=0), "repeats must be at least 1, got 0"),
        (NeedleSettings(lengths=(20,)), "length 20 is too short"),
        (NeedleSettings(lengths=(100_000,)), "length 100000 asks for"),
        (NeedleSettings(lengths=(200,), digits=1), "found 9 numbers of 1 digits .* needs 10"),
    ],
)
def test_needle_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        build_cases(tiny.tokenizer(), tiny.text(), settings)
