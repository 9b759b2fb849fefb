"""The published runs: a recipe for each staging of each layout, its numbers, its memory, and a run of it in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from hylo import HyloForCausalLM, published_variants
from hylo.distill import Recipe, load_recipe, run_recipe
from hylo.distill.models import with_rope
from hylo.distill.output import result_directory
from hylo.distill.student import student_config
from hylo.errors import UserError
from hylo.memory import memory_command, parameter_counts, peak, stage_job
from tests.distill_fixtures import logged, quiet, shipped, shrunk

STAGINGS = {
    "8k": ["align", "distil-8k"],
    "64k": ["align", "distil-64k"],
    "8k-64k": ["align", "distil-8k", "distil-64k"],
}
# layers of the base -> what its recipes' names begin with, learning rate of distillation
BASES = {
    ("Llama", 16): ("llama-3.2-1b", 6e-5),
    ("Llama", 28): ("llama-3.2-3b", 4e-5),
    ("Qwen", 28): ("qwen3-1.7b", 6e-5),
    ("8B", 32): ("llama-3.1-8b", 4e-5),
}


def base_of(variant: str) -> tuple[str, float]:
    return BASES[variant.split("-")[0], published_variants()[variant].num_hidden_layers]


VARIANTS = {f"{base_of(name)[0]}-{name.split('-')[1].lower()}": name for name in published_variants()}
RECIPES = {f"{stem}-{staging}": (name, staging) for stem, name in VARIANTS.items() for staging in STAGINGS}


def load(stem: str) -> Recipe:
    return load_recipe(shipped(f"{stem}.yaml"))


def test_every_published_variant_has_its_three_recipes() -> None:
    assert {path.stem for path in shipped("").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("stem", RECIPES)
def test_a_recipe_builds_the_published_model(stem: str) -> None:
    """Its dims, and after each stage of a released length the rotation of that length."""
    recipe, variant = load(stem), RECIPES[stem][0]
    config = student_config(recipe, dry_run=True)
    same = ("mixer_types", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "linear_num_heads", "linear_key_head_dim", "linear_value_head_dim", "qk_norm", "rms_norm_eps",
            "vocab_size", "hidden_size", "num_key_value_heads", "intermediate_size")  # fmt: skip
    published = published_variants()[variant]
    # The paper's only 8B layout has no Gated DeltaNet.
    relevant = [key for key in same if not (key.startswith("linear") and variant == "8B-8MLA24M2")]
    assert {key: getattr(config, key) for key in relevant} == {key: getattr(published, key) for key in relevant}
    assert parameter_counts(config) == parameter_counts(published)
    for stage in recipe.stages:
        config = with_rope(config, stage.rope)
        length = max(stage.sequence_length, 8192)
        assert config.rope_parameters == published_variants(length)[variant].rope_parameters, stage.name
        assert config.max_position_embeddings >= stage.sequence_length


@pytest.mark.parametrize("stem", RECIPES)
def test_a_recipe_has_the_published_stages(stem: str) -> None:
    variant, staging = RECIPES[stem]
    recipe, (base, rate) = load(stem), base_of(variant)
    small = base == "llama-3.2-1b" or (base == "qwen3-1.7b" and variant.endswith("M2"))
    published = {
        "align": ("ild", 2048, 96, 2e-4, 0.2),
        "distil-8k": ("kl", 8192, 32 if small else 16, rate, 1),
        "distil-64k": ("kl", 65536, 8, rate, 1),
    }
    keys = ("kind", "sequence_length", "sequences_per_step", "learning_rate", "data_fraction")
    found = {stage.name: tuple(getattr(stage, key) for key in keys) for stage in recipe.stages}
    assert found == {name: published[name] for name in STAGINGS[staging]}
    assert {(stage.schedule, stage.warmup_ratio, stage.epochs) for stage in recipe.stages} == {("cosine", 0.01, 1)}
    assert recipe.teacher == ("Qwen/Qwen3-8B" if base.startswith("qwen") else "meta-llama/Llama-3.1-8B-Instruct")
    assert (recipe.name, recipe.output) == (stem, f"runs/{stem}")


@pytest.mark.parametrize("stem", RECIPES)
def test_the_memory_of_every_recipe(stem: str) -> None:
    """It fits the GPUs that the published models were trained on: eight with 192 GB each."""
    console, gib = quiet(), 178
    path = shipped(f"{stem}.yaml")
    memory_command(path, stage=None, gpus=8, length=None, batch=None, gpu_gib=gib, overrides=(), console=console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    left = [line.split()[3:] for line in printed.splitlines() if line.startswith(f"left of {gib}")]
    assert len(left) == len(STAGINGS[RECIPES[stem][1]]) + 1, "a table a stage, and the one of inference"
    assert min(float(number) for line in left for number in line) > 0


def test_the_page_has_every_layouts_memory() -> None:
    page = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    for stem, variant in VARIANTS.items():
        recipe = load(f"{stem}-8k-64k")
        peaks = [[peak(stage_job(recipe, i, gpus=gpus)).total / 2**30 for gpus in (1, 8)] for i in range(3)]
        cells = [f"{alone:.1f} / {of_eight:.1f}" for alone, of_eight in peaks]
        assert f"| {variant} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("stem", [stem for stem, (_, staging) in RECIPES.items() if staging == "8k-64k"])
def test_a_recipe_dry_runs_offline(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one by way of 8K has the stages of both others."""
    path = shipped(f"{stem}.yaml")
    recipe = load_recipe(path)
    monkeypatch.chdir(tmp_path)
    console = quiet()
    assert run_recipe(path, dry_run=True, console=console) is None
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    parameters = parameter_counts(published_variants()[RECIPES[stem][0]]).total
    assert printed.count(f"{parameters:,}") == 6, "every parameter is there and trains, in all stages"
    for stage in recipe.stages:
        assert f"first batch [{stage.sequences_per_step}, {stage.sequence_length}]" in printed
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize(
    ("stem", "mixer", "factors"),
    [
        ("llama-3.2-1b-4mla12gdn-8k-64k", "gated_deltanet", [4.0, 4.0, 32.0]),
        ("llama-3.2-1b-4mla12m2-64k", "mamba2", [4.0, 32.0]),
        ("qwen3-1.7b-7mla21gdn-8k-64k", "gated_deltanet", [None, None, 2.0]),
    ],
)
def test_a_recipe_runs_on_a_tiny_base_of_its_family(stem: str, mixer: str, factors: list[Any], tmp_path: Path) -> None:
    """Upcycle, align to the base, distil from a larger teacher; each stage keeps its rotation in its result."""
    recipe = shrunk(f"{stem}.yaml", tmp_path, steps=20)
    result = run_recipe(recipe, console=quiet())
    model = AutoModelForCausalLM.from_pretrained(result)
    assert isinstance(model, HyloForCausalLM)
    assert model.config.mixer_types == [mixer, "mla", mixer]
    results = [AutoConfig.from_pretrained(result_directory(recipe, i)) for i in range(len(recipe.stages))]
    assert [config.rope_parameters.get("factor") for config in results] == factors
    lengths = {row["stage"]: row["tokens"] // row["step"] // 2 for row in logged(tmp_path)}
    assert list(lengths.values()) == [16 * 2**i for i in range(len(factors))]
