"""Short runs from end to end: what they leave behind, and what they refuse."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hylo.distill import parse_recipe, run_recipe
from hylo.distill.engine import learning_rate
from hylo.errors import UserError
from tests.distill_fixtures import logged, make_world, quiet, recipe_values, save_llama


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


# ---------------------------------------------------------------- schedule


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path: Path) -> None:
    stage = parse_recipe(recipe_values(tmp_path, {"name": "a", "kind": "ce", "warmup_ratio": 0.1})).stages[0]
    rates = [learning_rate(stage, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(0.5e-3)
    assert 0 < rates[-1] < 1e-6
    assert rates[9:] == sorted(rates[9:], reverse=True)


# ---------------------------------------------------------------- runs


STAGES = (
    {"name": "align", "kind": "ild", "steps": 12, "learning_rate": 5e-3, "data_fraction": 0.5},
    {"name": "distil", "kind": "kl", "steps": 12, "learning_rate": 5e-3, "sequence_length": 32, "kl_chunk_tokens": 20},
)


def test_run_lowers_the_losses_and_leaves_a_loadable_model(world: Path) -> None:
    console = quiet()
    result = run_recipe(parse_recipe(recipe_values(world, *STAGES)), console=console)
    assert result == world / "run" / "distil" / "model"
    log = logged(world)
    assert [(row["stage"], row["step"]) for row in log] == [
        (stage, step) for stage in ("align", "distil") for step in range(1, 13)
    ]
    for stage in ("align", "distil"):
        losses = [row["loss"] for row in log if row["stage"] == stage]
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert log[-1]["tokens"] == 12 * 2 * 32
    assert set(log[0]) == {"stage", "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    assert isinstance(AutoModelForCausalLM.from_pretrained(result), LlamaForCausalLM)
    assert (result / "tokenizer.json").exists()
    assert not list(world.glob("run/**/*.partial"))
    assert not list(world.glob("run/*/checkpoints"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stage align (ild): 12 steps" in printed
    assert "mixer LlamaAttention" in printed
    assert "distil step 12/12 loss" in printed
    assert "s left" in printed


def test_terminal_gets_a_progress_bar(world: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    run_recipe(parse_recipe(recipe_values(world, {"name": "ce", "kind": "ce"})), console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in printed
    assert "tokens/s" in printed
    assert "0:00:00" in printed


def test_accumulation_checkpointing_and_tiles_give_the_same_run(world: Path) -> None:
    losses = {}
    for name, change in {
        "plain": {"batch_size": 4},
        "split": {"batch_size": 1, "gradient_accumulation": 4},
        "recomputed": {"batch_size": 4, "activation_checkpointing": True},
        "selective": {"batch_size": 4, "activation_checkpointing": "selective"},
        "tiled": {"batch_size": 4, "activation_checkpointing": True, "mlp_tile_tokens": 50},
    }.items():
        values = recipe_values(world, STAGES[1] | change, output=str(world / name))
        run_recipe(parse_recipe(values), console=quiet())
        losses[name] = [json.loads(line)["loss"] for line in (world / name / "log.jsonl").open()]
    assert losses["split"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["recomputed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["selective"] == losses["recomputed"]
    assert losses["tiled"] == pytest.approx(losses["plain"], rel=1e-5)


def test_larger_teacher_and_bf16(world: Path) -> None:
    save_llama(world / "teacher", hidden_size=24, num_hidden_layers=3)
    values = recipe_values(world, STAGES[1] | {"steps": 4}, precision="bf16")
    result = run_recipe(parse_recipe(values), console=quiet())
    assert result is not None
    weights = AutoModelForCausalLM.from_pretrained(result).state_dict()
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_frozen_parameters_stay(world: Path) -> None:
    stage = {"name": "ce", "kind": "ce", "trainable": ["mlp"], "steps": 2}
    result = run_recipe(parse_recipe(recipe_values(world, stage, teacher=None)), console=quiet())
    before = AutoModelForCausalLM.from_pretrained(world / "student").state_dict()
    after = AutoModelForCausalLM.from_pretrained(result).state_dict()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) == ("mlp" not in name), name


def test_stage_rope_is_kept_in_the_result(world: Path) -> None:
    rope = {"factor": 4.0, "original_max_position_embeddings": 16, "max_position_embeddings": 256}
    stage = {"name": "long", "kind": "ce", "sequence_length": 128, "steps": 1, "rope": rope}
    result = run_recipe(parse_recipe(recipe_values(world, stage)), console=quiet())
    config = AutoModelForCausalLM.from_pretrained(result).config
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["rope_type"] == "yarn"
    assert config.rope_parameters["factor"] == 4.0


def test_steps_from_tokens_epochs_and_scale(world: Path) -> None:
    values = recipe_values(
        world,
        {"name": "a", "kind": "ce", "steps": None, "tokens": 100},
        {"name": "b", "kind": "ce", "steps": None, "epochs": 0.5, "data_fraction": 0.2},
    )
    run_recipe(parse_recipe(values), console=quiet())
    tokens = sum(len(f"{i}: ") + 75 for i in range(60)) + 2
    expected_b = int(0.5 * int(tokens // 16 * 0.2) / 2)
    assert sum(row["stage"] == "a" for row in logged(world)) == 4
    assert sum(row["stage"] == "b" for row in logged(world)) == expected_b
    scaled = parse_recipe(values | {"output": str(world / "scaled")})
    run_recipe(scaled, steps_scale=0.5, console=quiet())
    lines = [json.loads(line) for line in (world / "scaled" / "log.jsonl").open()]
    assert sum(row["stage"] == "a" for row in lines) == 2


def test_tensorboard_is_written_when_asked_for(world: Path) -> None:
    pytest.importorskip("tensorboard")
    run_recipe(parse_recipe(recipe_values(world, {"name": "a", "kind": "ce"}, tensorboard=True)), console=quiet())
    assert list((world / "run" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda root: save_llama(root / "teacher", vocab_size=300),
            "teacher of stage 'kl' has a vocabulary of 300 and",
        ),
        (lambda root: save_llama(root / "teacher", max_position_embeddings=8), "16, longer than the teacher's"),
        (lambda root: save_llama(root / "student", max_position_embeddings=8), "16, longer than the student's"),
        (lambda root: small_vocabularies(root), "tokenizer has 258 tokens but the student's vocabulary only 200"),
        (lambda root: (root / "text.txt").write_bytes(b"abc\xff"), "not UTF-8: byte 0xff at offset 3"),
        (lambda root: (root / "text.txt").write_text("short"), "fewer than one sequence of 16"),
        (lambda root: (root / "student" / "config.json").unlink(), "cannot load student '.*student'"),
        (lambda root: swap_tokens(root / "teacher" / "tokenizer.json"), "gives the token '<s>' the id 1"),
        (
            lambda root: truncate(root / "teacher" / "model.safetensors"),
            r"weight file '.*teacher/model.safetensors' is truncated",
        ),
        (lambda root: (root / "run").write_text("a file"), "output directory '.*run' exists"),
    ],
)
def test_bad_input_writes_no_output(world: Path, break_it: Any, message: str) -> None:
    break_it(world)
    with pytest.raises(UserError, match=message) as caught:
        run_recipe(parse_recipe(recipe_values(world, {"name": "kl", "kind": "kl"})), console=quiet())
    assert "\n" not in str(caught.value)
    assert not (world / "run").is_dir()


def small_vocabularies(root: Path) -> None:
    for name in ("student", "teacher"):
        save_llama(root / name, vocab_size=200)


def swap_tokens(path: Path) -> None:
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["<s>"], vocabulary["</s>"] = 1, 0
    for token in values["added_tokens"]:
        token["id"] = 1 - token["id"]
    path.write_text(json.dumps(values))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def drop_weight(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (Path.unlink, r"weight file '.*student/model.safetensors' is missing"),
        (truncate, r"weight file '.*student/model.safetensors' is truncated"),
        (drop_weight, "lacks the weight 'model.norm.weight'"),
    ],
)
def test_damaged_weights_are_refused(world: Path, break_it: Any, message: str) -> None:
    break_it(world / "student" / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        run_recipe(parse_recipe(recipe_values(world, {"name": "ce", "kind": "ce"})), console=quiet())
    assert "\n" not in str(caught.value)
    assert not (world / "run").exists()


def test_alignment_needs_equal_shapes(world: Path) -> None:
    save_llama(world / "teacher", num_hidden_layers=3)
    values = recipe_values(world, {"name": "align", "kind": "ild"})
    with pytest.raises(UserError, match="num_hidden_layers of teacher and student are 3 and 2"):
        run_recipe(parse_recipe(values), console=quiet())


def test_pattern_of_a_later_stage_is_checked_before_the_first(world: Path) -> None:
    stages = ({"name": "one", "kind": "ce"}, {"name": "two", "kind": "ce", "trainable": ["mlq"]})
    with pytest.raises(UserError, match="trainable pattern 'mlq'"):
        run_recipe(parse_recipe(recipe_values(world, *stages)), console=quiet())
    assert not (world / "run").exists()


def test_loss_that_is_not_finite_stops_the_run(world: Path) -> None:
    stage = {"name": "ce", "kind": "ce", "learning_rate": 1e30, "grad_clip": None, "warmup_ratio": 0}
    with pytest.raises(UserError, match=r"the loss of stage 'ce' is .* at step 2"):
        run_recipe(parse_recipe(recipe_values(world, stage)), console=quiet())


# ---------------------------------------------------------------- from a base to a hybrid


def test_assembled_student_takes_layers_from_two_aligned_models(world: Path) -> None:
    shutil.rmtree(world / "student")
    for part, layers in (("mla", [0, 1]), ("linear", [])):
        block = {"base": str(world / "teacher"), "mixer": "mamba2", "mla_layers": layers, "kv_lora_rank": 4}
        stage = {"name": "align", "kind": "ild", "steps": 2}
        values = recipe_values(world, stage, student={"upcycle": block}, output=str(world / part), teacher=None)
        run_recipe(parse_recipe(values), console=quiet())
    parts = {part: world / part / "align" / "model" for part in ("mla", "linear")}
    block = {name: str(path) for name, path in parts.items()} | {"mla_layers": [1]}
    values = recipe_values(world, {"name": "distil", "kind": "kl", "steps": 1}, student={"assemble": block})
    run_recipe(parse_recipe(values), console=quiet())
    student, mla, linear = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (world / "run" / "student", parts["mla"], parts["linear"])
    )
    for name, weight in student.items():
        assert torch.equal(weight, (linear if name.startswith("model.layers.0.") else mla)[name]), name
    run_recipe(parse_recipe(values), dry_run=True, console=quiet())


def test_unsupported_base_writes_nothing(world: Path) -> None:
    block = {"base": str(world / "student"), "mixer": "mamba2", "mla_layers": [0]}
    config = json.loads((world / "student" / "config.json").read_text())
    config |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (world / "student" / "config.json").write_text(json.dumps(config))
    values = recipe_values(world, {"name": "align", "kind": "ild"}, student={"upcycle": block})
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        run_recipe(parse_recipe(values), console=quiet())
    assert not (world / "run").exists()
