"""The comparison of one process with two, at a tiny size on a CPU."""

import pytest

from bench import processes
from bench.processes import ROOT, SIZES, Size, compare
from hylo.distill import load_recipe

TINY = Size(
    layers=2,
    length=32,
    batch_size=2,
    gradient_accumulation=2,
    changes={
        "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "linear_num_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
    },
)  # fmt: skip


def test_two_processes_beside_one():
    result = compare(TINY, counts=(1, 2), steps=8, device="cpu")
    alone, two = result["runs"]
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert len(alone["losses"]) == len(two["losses"]) == 8
    assert alone["losses"][-1] < alone["losses"][0]
    assert two["loss_difference"] < 1e-5
    assert two["speed_ratio"] == pytest.approx(two["tokens_per_second"] / alone["tokens_per_second"])
    assert (len(alone["peak_gib"]), len(two["peak_gib"])) == (1, 2)
    assert result["tokens_per_step"] == 2 * 2 * 32


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["bench.processes"])
    assert processes.main() == 2
    assert capsys.readouterr().err == "error: 2 processes need a GPU each, and torch finds 1\n"


def test_a_step_at_1b_is_of_the_recipes_batches():
    """One process makes two passes of four sequences in a step, two make one each."""
    stages = load_recipe(ROOT / "recipes" / "llama-3.2-1b-4mla12gdn-8k.yaml").stages
    (recipe,) = (stage for stage in stages if stage.name == "distil-8k")
    size = SIZES["1b"]
    assert (size.length, size.batch_size) == (recipe.sequence_length, recipe.batch_size)
    assert size.batch_size * size.gradient_accumulation == 8
