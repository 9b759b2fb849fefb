"""Recipes: those that must be refused, files that extend others, what a stage gives its teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hylo.distill import load_recipe, parse_recipe, run_recipe
from hylo.distill.stages import _load_teacher
from hylo.errors import UserError
from tests.distill_fixtures import make_world, quiet, recipe_values, save_base

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


# ---------------------------------------------------------------- files that extend others


def write_files(root: Path, **files: Any) -> Path:
    """Files by their stem; the last one's path."""
    for stem, values in files.items():
        (root / f"{stem}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return root / f"{stem}.yaml"


def test_a_file_is_laid_over_those_that_it_extends(tmp_path: Path) -> None:
    values = recipe_values(tmp_path, KL, KL | {"name": "last"}, seed=1, teacher="one")
    values["stages"] = {stage.pop("name"): stage for stage in values["stages"]}
    del values["name"], values["output"]
    path = write_files(
        tmp_path,
        base=values,
        beside={"seed": 2, "teacher": "two"},
        run={
            "extends": ["base.yaml", "beside.yaml"],
            "teacher": "three",
            "data": {"sources": [{"text": "new"}]},
            "stages": {"last": {"batch_size": 7}, "more": {**values["stages"]["kl"], "kind": "ce"}},
            "order": ["more", "last"],
        },
    )
    recipe = load_recipe(path, overrides=["stages.0.batch_size=9"])
    assert (recipe.name, recipe.output, recipe.seed, recipe.teacher) == ("run", "runs/run", 2, "three")
    assert [source.text for source in recipe.data.sources] == ["new"], "a list is replaced"
    assert recipe.data.cache_dir == str(tmp_path / "cache"), "a mapping is joined"
    assert [(stage.name, stage.kind, stage.batch_size) for stage in recipe.stages] == [
        ("more", "ce", 9),
        ("last", "kl", 7),
    ]
    write_files(tmp_path, run={"extends": "base.yaml", "name": "other"})
    recipe = load_recipe(path)
    assert [stage.name for stage in recipe.stages] == ["kl", "last"], "as they stand"
    assert recipe.output == "runs/other"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extends": "nowhere.yaml"}, r"cannot read recipe '.*nowhere.yaml': No such file"),
        ({"extends": "run.yaml"}, r"recipe '.*run.yaml' extends itself: .*run.yaml -> .*run.yaml"),
        ({"extends": 3}, r"recipe '.*run.yaml': 'extends' is a name or a list of names, got 3"),
        ({"stages": {"kl": {}}, "order": 3}, r"recipe '.*run.yaml': 'order' is a name or a list of names, got 3"),
        ({"stages": {"kl": {}}, "order": ["lk"]}, r"order names stage 'lk', and there are only kl"),
        ({"stages": {"kl": 3}}, r"'stages.0' = 3"),
        ({"order": ["kl"]}, r"unknown key 'order'"),
        ({"stages": {}, "order": []}, r"'stages' = \[\]"),
    ],
)
def test_what_a_file_cannot_extend_or_order(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write_files(tmp_path, run=recipe_values(tmp_path, KL) | values)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_keys_of_an_anchor_give_way_to_a_mapping_s_own(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = yaml.safe_dump(recipe_values(tmp_path) | {"stages": None})
    stage = "{kind: ce, sequence_length: 16, batch_size: 2, learning_rate: 1.0e-3, steps: 3}"
    path.write_text(values.replace("stages: null", f"stages:\n  a: &a {stage}\n  b: {{<<: *a, steps: 4}}"))
    assert [stage.steps for stage in load_recipe(path).stages] == [3, 4]
    path.write_text(path.read_text().replace("steps: 4", "steps: 4, steps: 5"))
    with pytest.raises(UserError, match="key 'steps' is given twice"):
        load_recipe(path)


def test_a_teacher_gets_the_positions_that_its_stage_names(tmp_path: Path) -> None:
    """Beyond its own window, in the check, in the dry run and where it is loaded."""
    make_world(tmp_path)
    save_base(tmp_path / "student", "llama", max_position_embeddings=128)
    rope = {"factor": 2.0, "original_max_position_embeddings": 64, "max_position_embeddings": 128}
    values = recipe_values(tmp_path, KL | {"sequence_length": 100, "steps": 1})
    with pytest.raises(UserError, match="sequence_length 100, longer than the teacher's max_position_embeddings 64"):
        run_recipe(parse_recipe(values), console=quiet())
    values["stages"][0]["teacher_rope"] = rope
    recipe = parse_recipe(values)
    run_recipe(recipe, dry_run=True, console=quiet())
    assert run_recipe(recipe, console=quiet()) is not None
    (stage,) = recipe.stages
    teacher: Any = _load_teacher(recipe, stage, torch.device("cpu"))
    assert teacher.config.rope_parameters["factor"] == 2.0
    plain: Any = _load_teacher(recipe, stage.model_copy(update={"teacher_rope": None}), torch.device("cpu"))
    ids = torch.arange(100)[None]
    assert not torch.equal(teacher(ids).logits, plain(ids).logits)
