"""The training step beside peers, at a tiny size on a CPU: stand-ins take the peers' places, so this is plumbing."""

import json
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import hylo
from bench import train_step
from bench.flops import forward_flop, step_flop
from bench.peers import Missing
from bench.steps import random_steps
from bench.train_step import CASES, Side, TrainCase, errors, main, measure, own_side, peer_side, probe, row
from hylo.distill import Recipe, load_recipe
from hylo.distill.recomputing import recompute_layers
from hylo.distill.tiling import tile_mlps
from hylo.memory import peak, stage_job
from hylo.mixers import GatedDeltaNet, Mamba2, MultiHeadLatentAttention, norm, packing
from tests import fake_libraries
from tests.distill_fixtures import shipped

TINY = {
    "student.upcycle": {"mla_layers": [1], "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
                        "qk_rope_head_dim": 4, "v_head_dim": 8, "linear_num_heads": 3, "linear_key_head_dim": 8,
                        "linear_value_head_dim": 16},
    "dry_run.base_config": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "dry_run.teacher_config": {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "stages.1": {"sequence_length": 70, "batch_size": 2, "gradient_accumulation": 1},
}  # fmt: skip
CPU = torch.device("cpu")


def tiny(layout: str, **stage: Any) -> Recipe:
    values = {f"{part}.{key}": value for part, block in TINY.items() for key, value in block.items()}
    values |= {f"stages.1.{key}": value for key, value in stage.items()}
    path = shipped(f"llama-3.2-1b-{layout}-8k.yaml")
    return load_recipe(path, overrides=[f"{key}={json.dumps(value)}" for key, value in values.items()])


PEERS = [("4mla12gdn", "fla"), ("4mla12m2", "mamba_ssm")]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_libraries.install(monkeypatch)


# ---------------------------------------------------------------- contestants


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize(("layout", "peer"), PEERS)
def test_ours_and_a_peer_take_turns_on_one_model(libraries: None, layout: str, peer: str, kind: str) -> None:
    found = measure(tiny(layout, kind=kind), 1, [peer], 2, CPU, lambda: 7)
    assert list(found) == ["hylo", peer]
    for entry in found.values():
        assert len(entry["rounds"]) == 2
        assert entry["peak_bytes"] == 7
        assert max(entry["errors"].values()) < 0.03


@pytest.mark.parametrize(("layout", "peer"), PEERS)
def test_a_peers_layers_compute_the_same_on_the_same_parameters(
    libraries: None, monkeypatch: pytest.MonkeyPatch, layout: str, peer: str
) -> None:
    """Within the budget of rounding; another function in one layer is beyond it. Nothing of ours is in their step."""
    steps = random_steps(tiny(layout), 1, CPU, 1)
    model: Any = steps.job.student
    before = dict(model.named_parameters())
    ours = own_side(model)
    exact = probe(steps, ours, half=False)
    own = errors(steps, ours, exact)
    side = peer_side(model, ours, peer)
    for pieces, theirs in zip(ours.layers, side.layers, strict=True):
        assert pieces.keys() == theirs.keys()
        assert all(type(piece).__module__.startswith("bench.peers") for piece in theirs.values())
    for module, name in ((packing, "project_at_once"), (norm, "rms_norm"), (hylo.model, "swiglu")):
        monkeypatch.setattr(module, name, None)
    for mixer in (GatedDeltaNet, Mamba2, MultiHeadLatentAttention):
        monkeypatch.setattr(mixer, "forward", None)
    theirs = errors(steps, side, exact)
    assert all(theirs[what] <= train_step.BUDGET * own[what] for what in own)
    assert max(own.values()) < 0.03
    for name in ("mixer", "mlp", "post_attention_layernorm"):
        broken = Side([{**pieces, name: Times(pieces[name])} for pieces in side.layers], side.norm)
        wrong = errors(steps, broken, exact)
        assert any(wrong[what] > train_step.BUDGET * own[what] for what in own), name
    ours.install(model)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(one is before[name] for name, one in model.named_parameters())


class Times(nn.Module):
    """Gives more than what it stands for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        found = self.module(*args, **options)
        return (4 * found[0], found[1]) if isinstance(found, tuple) else 4 * found


def test_norms_of_queries_are_in_no_peer(libraries: None) -> None:
    config = stage_job(tiny("4mla12gdn"), 1).student
    config.qk_norm = True
    with pytest.raises(Missing, match="norms of queries and keys"):
        train_step.mixers.SdpaMla(MultiHeadLatentAttention(config, 1))


def test_a_peer_that_is_not_there_is_wrong_or_has_no_memory_is_missing(
    libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("4mla12gdn", kind="ce")
    library = import_module("fla.ops.gated_delta_rule")
    rule = library.chunk_gated_delta_rule

    def replaced_by(function: Any) -> dict[str, Any]:
        monkeypatch.setattr(library, "chunk_gated_delta_rule", function)
        found = measure(recipe, 1, ["fla"], 1, CPU, lambda: 0)
        assert len(found["hylo"]["rounds"]) == 1
        return found["fla"]

    def full(q: Any, *others: Any, **options: Any) -> Any:
        if len(q) > 1:  # as in the steps, not in the check
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rule(q, *others, **options)

    def breaks(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    wrong = replaced_by(lambda q, k, *others, **options: rule(k, q, *others, **options))
    assert wrong["missing"].startswith("disagrees with fp32: ")
    assert replaced_by(full)["missing"] == "out of memory"
    assert replaced_by(breaks)["missing"] == "RuntimeError: no kernel"
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    found = measure(recipe, 1, ["fla"], 1, CPU, lambda: 0)
    assert found["fla"]["missing"].startswith("not installed: ")


def test_ours_without_memory_leaves_the_peer_its_turns(libraries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step = train_step.timed_step

    def full(steps: Any, side: Any, number: int) -> float:
        if isinstance(side.norm, norm.RMSNorm):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(steps, side, number)

    monkeypatch.setattr(train_step, "timed_step", full)
    found = row("tiny", TinyCase("", 1, {}), ["fla", "mamba_ssm"], 1, CPU, lambda: 0)
    assert found["missing"] == "out of memory"
    assert (found["best_peer"], found["ratio"]) == (None, None)
    assert list(found["peers"]) == ["fla"], "of the libraries with kernels for the layout"
    assert found["peers"]["fla"]["tokens_per_second"] > 0
    assert "hylo missing, out of memory" in train_step.lines(found)[0]


def test_a_step_that_is_not_finite_ends_the_run() -> None:
    steps = random_steps(tiny("4mla12gdn"), 1, CPU, 1)
    steps.job.student.lm_head.weight.data[0, 0] = torch.nan  # type: ignore[union-attr,index]
    with pytest.raises(AssertionError, match="loss nan"):
        train_step.timed_step(steps, own_side(steps.job.student), 0)


# ---------------------------------------------------------------- cases and rows


@dataclass(frozen=True)
class TinyCase(TrainCase):
    def load(self) -> Recipe:
        return tiny("4mla12gdn")


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_step_of_one_micro_batch(name: str) -> None:
    case = CASES[name]
    job = stage_job(case.load(), case.stage)
    mixer, kind, length = name.split("-")[:3]
    assert job.student.mixer_types is not None
    assert {"gdn": "gated_deltanet", "m2": "mamba2"}[mixer] in job.student.mixer_types
    assert (job.kind, job.teacher is not None) == (kind, kind == "kl")
    assert job.length == {"8k": 8192, "64k": 65536}[length]
    assert job.checkpointing == ("selective" if name.endswith("selective") else True)
    assert not job.accumulates


def test_a_case_is_filled_up_to_the_memory_that_there_is() -> None:
    case = CASES["gdn-kl-8k-full"]
    room = 70 * 2**30
    filled = case.filled(room)
    job = stage_job(filled.load(), filled.stage)
    assert job.batch > 4
    assert peak(job).total <= room < peak(replace(job, batch=job.batch + 1)).total
    assert case.filled(1).changes["batch_size"] == 1
    assert CASES["gdn-kl-8k"].filled(room) is CASES["gdn-kl-8k"]


def test_a_row_says_what_was_run_and_how_fast(libraries: None) -> None:
    found = row("tiny", TinyCase("llama", 1, {}), ["fla"], 1, CPU, lambda: 3)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["teacher"], found["shape"]) == ("kl", True, {"B": 2, "T": 70})
    assert found["tokens_per_second"] == pytest.approx(140 / found["seconds"])
    assert found["ratio"] == pytest.approx(found["peers"]["fla"]["seconds"] / found["seconds"])
    assert found["mfu"] is None, "of a CPU no peak is known"
    job = stage_job(tiny("4mla12gdn"), 1)
    entry = {"rounds": [2.0, 1.0, 4.0]}
    rates = train_step.rates(job, entry, "NVIDIA H200")
    assert rates["seconds"] == 2.0
    assert rates["mfu"] == pytest.approx(step_flop(job).model / 2 / 989.4e12)
    assert rates["hfu"] > rates["mfu"]


def test_the_file_has_a_row_for_each_case(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """With a GPU of 80 GB that does each step in a second."""
    gpu = SimpleNamespace(total_memory=80 * 10**9)
    timed = {"errors": {}, "rounds": [1.0], "peak_bytes": 2**30}
    missing = {"missing": "out of memory"}
    for name, fake in {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.get_device_properties": lambda _: gpu,
        "torch.cuda.get_device_name": lambda _: "NVIDIA H100 80GB HBM3",
        "bench.timing.product_flop_rate": lambda: 7e14,
        "bench.record.meta": lambda commit: {"gpu": "NVIDIA Fake", "commit": commit},
        "bench.train_step.measure": lambda _, __, peers, *___: {"hylo": timed} | dict.fromkeys(peers, missing),
    }.items():
        monkeypatch.setattr(name, fake)
    out = tmp_path / "results" / "train_step.json"
    assert main(["--out", str(out), "--commit", "abc"]) == 0
    written = json.loads(out.read_text())
    assert written["meta"] == {"gpu": "NVIDIA Fake", "commit": "abc", "product_flop_per_second": 7e14}
    rows = {row["case"]: row for row in written["rows"]}
    assert list(rows) == list(CASES)
    assert rows["m2-ce-64k"]["peers"] == {"mamba_ssm": missing}
    assert rows["gdn-kl-8k-full"]["shape"]["B"] > rows["gdn-kl-8k"]["shape"]["B"] == 4
    assert 0 < rows["gdn-kl-64k"]["mfu"] < rows["gdn-kl-64k"]["hfu"]
    assert "fla missing, out of memory" in capsys.readouterr().out
    assert main(["--case", "gdn-ce-8k", "--batch", "3", "--peers", "--out", str(out), "--commit", "abc"]) == 0
    (only,) = json.loads(out.read_text())["rows"]
    assert (only["shape"]["B"], only["peers"]) == (3, {})


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
    assert "the training step needs an NVIDIA GPU" in capsys.readouterr().err


# ---------------------------------------------------------------- FLOP


@pytest.mark.parametrize("mixer", ["mla", "gated_deltanet", "mamba2"])
def test_products_with_weights_as_pytorch_counts_them(mixer: str) -> None:
    """Recurrences it does not see, and of attention it counts all pairs where the causal half is needed."""
    config = stage_job(tiny("4mla12gdn"), 1).student
    values = config.to_dict() | {"mixer_types": [mixer] * 3, "layer_types": None}
    dims = hylo.HyloConfig.from_dict(values)
    with torch.device("meta"):
        model = hylo.HyloForCausalLM(dims)
        ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model.model(ids)
    linear = 2 * forward_flop(dims, 64) - forward_flop(dims, 128) / 2  # without what grows with the square
    recurrent = 64 * 3 * {"mla": 0, "gated_deltanet": 6 * 3 * 8 * 16, "mamba2": 4 * 4 * 8 * 8}[mixer]
    causal = forward_flop(dims, 64) - linear
    assert counter.get_total_flops() == linear - recurrent + 2 * causal


def test_a_step_is_three_forwards_and_the_teachers() -> None:
    job = replace(stage_job(tiny("4mla12gdn"), 1), checkpointing=False)
    flop = step_flop(job)
    heads = 2 * 140 * 97
    assert flop.student == 3 * (2 * forward_flop(job.student, 70) + heads * 32)
    assert flop.teacher == 2 * forward_flop(job.teacher, 70) + heads * 48
    assert (flop.again, flop.model) == (0, flop.student + flop.teacher)
    assert step_flop(replace(job, teacher=None)).teacher == 0


def counted(dims: hylo.HyloConfig, tile: int | None, checkpointing: Any) -> int:
    """FLOP of forward and backward of 2 x 70 tokens, with all pairs of attention; fp32 fills no columns up."""
    model = hylo.HyloForCausalLM(dims).train()
    if checkpointing:
        recompute_layers(model, keep_attention=checkpointing == "selective")
    if tile is not None:
        tile_mlps(model, tile)
    ids = torch.arange(70).repeat(2, 1)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        model.model(ids, use_cache=False).last_hidden_state.sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("tile", [None, 16, 70, 140])
@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
@pytest.mark.parametrize("mixer", ["mla", "gated_deltanet"])
def test_what_runs_again_is_what_pytorch_counts_beyond_a_step_that_keeps_all(
    mixer: str, checkpointing: Any, tile: int | None
) -> None:
    """140 tokens; recurrences it does not see."""
    job = stage_job(tiny("4mla12gdn"), 1)
    dims = hylo.HyloConfig.from_dict(job.student.to_dict() | {"mixer_types": [mixer] * 3, "layer_types": None})
    job = replace(job, student=dims, checkpointing=checkpointing, tile=tile)
    unlike = 0
    if mixer == "mla":
        unlike = 2 * 3 * 4 * (8 + 8) * 70**2 * (checkpointing is True)  # half of the pairs
    elif checkpointing:
        unlike = -2 * 3 * 70 * 6 * 3 * 8 * 16
    assert step_flop(job).again + unlike == counted(dims, tile, checkpointing) - counted(dims, None, False)


def test_the_page_has_every_cases_flop() -> None:
    page = (Path(__file__).parents[1] / "docs" / "long-context.md").read_text()
    for name, case in CASES.items():
        if case.fills:
            continue
        job = stage_job(case.load(), case.stage)
        flop = step_flop(job)
        each = " | ".join(f"{part / job.tokens / 1e9:.2f}" for part in (flop.student, flop.teacher, flop.again))
        assert f"| {name} | {job.batch} x {job.length} | {each} | {flop.model / 1e15:.3f} |" in page
