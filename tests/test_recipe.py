"""Recipes that must be refused, and the published ones: dry run, dims, and a run on a tiny base of the family."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from hylo import HyloForCausalLM, published_variants
from hylo.distill import load_recipe, run_recipe
from hylo.distill.student import student_config
from hylo.errors import UserError
from tests.distill_fixtures import logged, quiet, recipe_values, save_base, shipped, write_text

# ---------------------------------------------------------------- recipes

KL = {"name": "kl", "kind": "kl"}
RECALL = {"documents": 1, "words": 9, "spacing": 4, "reach": 8, "patterns": [{"fact": "{key}", "question": "?"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, r"unknown key 'learning_rat' \(value 1\)"),
        ({"stages": [{**KL, "lr": 0.1}]}, r"unknown key 'stages.0.lr' \(value 0.1\)"),
        ({"stages": [{**KL, "mixer_weight": 1.0}]}, r"unknown key 'stages.0.mixer_weight'"),
        ({"stages": [{**KL, "kind": "dpo"}]}, r"'stages.0' = .*dpo"),
        ({"stages": [{**KL, "learning_rate": -1}]}, r"'stages.0.learning_rate' = -1: .*greater than 0"),
        ({"stages": [{**KL, "learning_rate": math.nan}]}, r"'stages.0.learning_rate' = nan"),
        ({"stages": [{**KL, "temperature": 0}]}, r"'stages.0.temperature' = 0: .*greater than 0"),
        ({"stages": [{**KL, "direction": "both"}]}, r"'stages.0.direction' = 'both': .*'forward' or 'reverse'"),
        ({"stages": [{**KL, "tokens": 10}]}, r"exactly one of steps, tokens, epochs, got steps, tokens"),
        ({"stages": [KL, KL]}, r"stage name 'kl' is taken"),
        ({"stages": [{**KL, "name": "a/b"}]}, r"'stages.0.name' = 'a/b'"),
        ({"stages": []}, r"'stages' = \[\]"),
        ({"teacher": None}, r"stage 'kl' of kind kl has no teacher"),
        ({"student": {}}, r"'student': student needs exactly one of path, upcycle, assemble, got none"),
        ({"student": {"upcycle": {"base": "x", "mixer": "mamba", "mla_layers": []}}}, r"'mamba'"),
        (
            {"student": {"upcycle": {"base": "x", "mixer": "mamba2", "mla_layers": [1], "kv_lora_rank": 0}}},
            r"'student.upcycle.kv_lora_rank' = 0: .*greater than 0",
        ),
        ({"data": {"sources": [{"text": "a", "jsonl": "b"}]}}, r"exactly one of text, jsonl, dataset"),
        (
            {"data": {"sources": [{"text": "a", "recall": RECALL}]}},
            r"'data.sources.0.recall.patterns.0': a pattern needs {key} and {value} and no other braces, got '{key}'",
        ),
        ({"stages": [{**KL, "sources": []}]}, r"'stages.0.sources' = \[\]"),
        ({"precision": "fp16"}, r"'precision' = 'fp16'"),
    ],
)
def test_bad_recipe_is_one_sentence(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    if "stages" in change:
        change = change | {"stages": recipe_values(tmp_path, *change["stages"])["stages"]}
    values = recipe_values(tmp_path, KL, **change) if "stages" not in change else recipe_values(tmp_path) | change
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_repeated_key_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(UserError, match="key 'name' is given twice, again in line 2"):
        load_recipe(tmp_path / "twice.yaml")


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_values(tmp_path, KL)))
    recipe = load_recipe(tmp_path / "r.yaml", overrides=["stages.0.learning_rate=2e-4", "seed=7"])
    assert recipe.stages[0].learning_rate == 2e-4
    assert recipe.seed == 7
    with pytest.raises(UserError, match="unknown key 'sed'"):
        load_recipe(tmp_path / "r.yaml", overrides=["sed=7"])
    with pytest.raises(UserError, match=r"'stages.4.steps=1' names no key"):
        load_recipe(tmp_path / "r.yaml", overrides=["stages.4.steps=1"])


# ---------------------------------------------------------------- published recipes

RECIPES = {
    "llama-3.2-1b-4mla12gdn-8k.yaml": ("Llama-4MLA12GDN", 1_673_797_776, [[96, 2048], [32, 8192]]),
    "qwen3-1.7b-7mla21gdn-8k.yaml": ("Qwen-7MLA21GDN", 2_284_173_820, [[96, 2048], [16, 8192]]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe_dry_runs_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shipped(name)
    monkeypatch.chdir(tmp_path)
    console = quiet()
    assert run_recipe(path, dry_run=True, console=console) is None
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    _, parameters, shapes = RECIPES[name]
    assert printed.count(f"{parameters:,}") == 4, "every parameter is there and trains, in both stages"
    assert [f"first batch {shape}" in printed for shape in shapes] == [True, True]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe_builds_the_published_model(name: str) -> None:
    recipe = load_recipe(shipped(name))
    config = student_config(recipe, dry_run=True)
    published = published_variants()[RECIPES[name][0]]
    same = ("mixer_types", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "linear_num_heads", "linear_key_head_dim", "linear_value_head_dim", "qk_norm", "rms_norm_eps",
            "rope_parameters", "num_key_value_heads", "intermediate_size")  # fmt: skip
    assert {key: getattr(config, key) for key in same} == {key: getattr(published, key) for key in same}


def test_dry_run_refuses_what_does_not_fit() -> None:
    path = shipped("llama-3.2-1b-4mla12gdn-8k.yaml")
    for override, message in (
        ("dry_run.teacher_config.vocab_size=32000", "vocabulary of 32000 and the student one of 128256"),
        ("stages.1.sequence_length=200000", "sequence_length 200000, longer than the student's"),
        ("student.upcycle.mla_layers=[1, 16]", "MLA layer 16 is out of range"),
        ("student.upcycle.kv_lora_rank=-3", "'student.upcycle.kv_lora_rank' = -3"),
        ("dry_run.base_config.model_type=nosuch", "cannot load base 'nosuch'"),
    ):
        with pytest.raises(UserError, match=message):
            run_recipe(path, dry_run=True, overrides=[override], console=quiet())


@pytest.mark.parametrize("name", RECIPES)
def test_published_recipe_runs_on_a_tiny_base_of_its_family(name: str, tmp_path: Path) -> None:
    """The shipped recipe with paths and sizes overridden: upcycle, align to the base, distil from a larger teacher."""
    family = "qwen3" if name.startswith("qwen") else "llama"
    save_base(tmp_path / "base", family, num_hidden_layers=3)
    save_base(tmp_path / "teacher", family, num_hidden_layers=4, hidden_size=24)
    write_text(tmp_path / "text.txt")
    overrides = [
        f"output={tmp_path / 'run'}",
        f"teacher={tmp_path / 'teacher'}",
        f"student.upcycle.base={tmp_path / 'base'}",
        "student.upcycle.mla_layers=[1]",
        "student.upcycle.q_lora_rank=8",
        "student.upcycle.kv_lora_rank=4",
        "student.upcycle.qk_nope_head_dim=2",
        "student.upcycle.qk_rope_head_dim=2",
        "student.upcycle.v_head_dim=4",
        "student.upcycle.linear_num_heads=2",
        "student.upcycle.linear_key_head_dim=4",
        "student.upcycle.linear_value_head_dim=8",
        f"data.sources=[{{text: {tmp_path / 'text.txt'}}}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "device=cpu",
        *(f"stages.{i}.{key}" for i in (0, 1) for key in ("sequence_length=32", "batch_size=2", "epochs=null")),
        *(f"stages.{i}.{key}" for i in (0, 1) for key in ("steps=4", "gradient_accumulation=1", "log_every=1")),
        "stages.0.learning_rate=1e-2",
        "stages.0.steps=20",
    ]
    result = run_recipe(shipped(name), overrides=overrides, console=quiet())
    model = AutoModelForCausalLM.from_pretrained(result)
    assert isinstance(model, HyloForCausalLM)
    assert model.config.mixer_types == ["gated_deltanet", "mla", "gated_deltanet"]
    assert model.config.rope_parameters["rope_type"] == ("yarn" if family == "llama" else "default")
    losses = [row["loss"] for row in logged(tmp_path) if row["stage"] == "align"]
    assert losses[-1] < 0.9 * losses[0]
