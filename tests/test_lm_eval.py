"""lm-eval's HFLM on our models, unchanged: a local multiple-choice and a local generation task, in padded batches."""

import json
import socket
from pathlib import Path

import datasets.config
import huggingface_hub.constants
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn.functional import cross_entropy

from tests import tiny

NEW_TOKENS = 6

CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
GENERATION_TASK = """
task: local_generation
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: ["<never>"]
  max_gen_toks: {new_tokens}
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def documents() -> list[dict]:
    """Questions of very different lengths, so that a batch has to be padded."""
    words = tiny.text().split()
    choices = ["river", "window and the old basket", "mountain"]
    return [{"question": " ".join(words[i : i + 2 + 5 * i]), "choices": choices, "answer": i % 3} for i in range(7)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskManager:
    """Both tasks in a directory of their own, and no way to the network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for module in (huggingface_hub.constants, datasets.config):  # which read the environment when imported
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip and compilers, for seconds

    def refuse(_, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents()), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "choice.yaml").write_text(CHOICE_TASK.format(data=data))
    (folder / "generation.yaml").write_text(GENERATION_TASK.format(data=data, new_tokens=NEW_TOKENS))
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(lm: HFLM, task: str, manager: TaskManager) -> tuple[dict, list[dict]]:
    """(metrics, samples in the order of the documents)."""
    result = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0, log_samples=True)
    return result["results"][task], sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def in_memory(model) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=4)


def ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def log_likelihood(model, context: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    return -cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


@torch.no_grad()
def greedy(model, prompt: list[int]) -> str:
    """Without cache, without padding, one token at a time."""
    out: list[int] = []
    while len(out) < NEW_TOKENS:
        out.append(int(model(torch.tensor([prompt + out])).logits[0, -1].argmax()))
        if out[-1] == tiny.tokenizer().eos_token_id:
            break
    return tiny.tokenizer().decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_multiple_choice(name, tasks):
    model = tiny.MODELS[name]()
    metrics, samples = run(in_memory(model), "local_choice", tasks)
    right = 0
    for document, sample in zip(documents(), samples, strict=True):
        expected = [log_likelihood(model, ids(document["question"]), ids(f" {c}")) for c in document["choices"]]
        got = [float(response[0]) for response in sample["filtered_resps"]]
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
        right += expected.index(max(expected)) == document["answer"]
    assert metrics["acc,none"] == pytest.approx(right / len(samples))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_generation_in_left_padded_batches(name, tasks):
    model = tiny.MODELS[name]()
    _, samples = run(in_memory(model), "local_generation", tasks)
    expected = [greedy(model, ids(document["question"])) for document in documents()]
    assert [sample["filtered_resps"][0] for sample in samples] == expected
    assert len(set(expected)) > 1


def test_saved_hybrid_loads_by_its_path(tasks, tmp_path):
    model = tiny.hylo()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    from_disk = HFLM(pretrained=str(tmp_path / "model"), device="cpu", batch_size=4)
    assert type(from_disk.model) is type(model)
    metrics, samples = run(from_disk, "local_choice", tasks)
    expected_metrics, expected_samples = run(in_memory(model), "local_choice", tasks)
    assert metrics == expected_metrics
    for sample, expected in zip(samples, expected_samples, strict=True):
        assert sample["filtered_resps"] == expected["filtered_resps"]
