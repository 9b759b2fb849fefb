"""Memory by formula: against the tensors of real models on a CPU, and on every recipe of the repository."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen3Config

import hylo
from hylo.distill import objectives
from hylo.distill.engine import spare_memory
from hylo.distill.layers import final_hidden
from hylo.distill.models import meta_model
from hylo.distill.objectives import loss_terms
from hylo.distill.recipe import load_recipe, parse_recipe
from hylo.distill.recomputing import recompute_layers
from hylo.distill.table import choose_trainable
from hylo.errors import UserError
from hylo.memory import Job, Phase, kept_for_backward, parameter_counts, peak, phases, stage_job
from hylo.memory.command import choices
from hylo.memory.recipe import trainable_counts
from tests.distill_fixtures import recipe_values
from tests.fake_memory import CountBytes
from tests.test_cli import one_sentence, run

# One of each base, all its stages; the command itself runs on every recipe in test_published_recipes.
LAYOUTS = ("llama-3.2-1b-4mla12gdn", "llama-3.2-3b-14mla14m2", "llama-3.1-8b-8mla24m2", "qwen3-1.7b-7mla21gdn")
RECIPES = [Path(__file__).parents[1] / "recipes" / f"{layout}-8k-64k.yaml" for layout in LAYOUTS]
STAGES = [(path, index) for path in RECIPES for index in range(len(load_recipe(path).stages))]
STAGE_IDS = [f"{path.stem}-{index}" for path, index in STAGES]
LENGTH = 640  # tokens: beside them the weights' own tensors are small


def config(*mixers: str, **changes: Any) -> hylo.HyloConfig:
    """Widths differ where PyTorch lets them: its attention on a CPU takes keys as wide as values alone."""
    return hylo.HyloConfig(
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": len(mixers),
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 2,
            "v_head_dim": 8,
            "linear_num_heads": 3,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 40,
            "mixer_types": list(mixers),
            "max_position_embeddings": 4096,
        }
        | changes
    )


def make_job(student: hylo.HyloConfig, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "student": student, "teacher": None, "kind": "ce", "batch": 1, "length": LENGTH, "accumulates": False,
        "half": False, "checkpointing": False, "tile": None, "chunk": 64, "trainable": parameter_counts(student),
        "cuda": False,
    }  # fmt: skip
    return Job(**(values | changes))


# ---------------------------------------------------------------- parameters, gradients, optimiser


@pytest.mark.parametrize("name", hylo.published_variants())
def test_parameters_of_every_published_layout(name: str) -> None:
    published = hylo.published_variants()[name]
    assert parameter_counts(published).total == meta_model(published).num_parameters()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_parameters_of_a_teacher(kind: type, tied: bool) -> None:
    teacher = kind(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied,
    )  # fmt: skip
    assert parameter_counts(teacher).total == meta_model(teacher).num_parameters()


@pytest.mark.parametrize("path", RECIPES, ids=LAYOUTS)
def test_parameters_of_the_recipes_teachers(path: Path) -> None:
    for index in (0, 1):  # the base itself, and the larger one
        teacher = stage_job(load_recipe(path), index).teacher
        assert parameter_counts(teacher).total == meta_model(teacher).num_parameters()


def test_no_formula_for_other_models() -> None:
    with pytest.raises(UserError, match="no memory formula for model type 'gpt2', only for hylo, llama and qwen3"):
        parameter_counts(config("mla", model_type="gpt2"))
    with pytest.raises(UserError, match="no memory formula for a 'llama' model with mlp_bias"):
        parameter_counts(LlamaConfig(mlp_bias=True))


@pytest.mark.parametrize("trainable", ["all", ["mlp", r"layers\.1\.mixer", "embed"]], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["ce", "ild"])
def test_parameters_gradients_and_moments_of_a_step(tmp_path: Path, kind: str, trainable: Any) -> None:
    """The bytes of real tensors after a real step; alignment reaches neither embedding nor head."""
    dims = config("gated_deltanet", "mla", "mamba2")
    student, teacher = hylo.HyloForCausalLM(dims), hylo.HyloForCausalLM(dims)
    choose_trainable(student, trainable)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad])
    (stage,) = parse_recipe(recipe_values(tmp_path, {"name": "stage", "kind": kind})).stages
    for term in loss_terms(stage, student, teacher, torch.arange(20).view(2, 10), torch.enable_grad):
        if term.requires_grad:
            term.backward()
    optimizer.step()
    job = make_job(dims, kind=kind, teacher=dims, trainable=trainable_counts(dims, trainable))
    step = phases(job)[-1]
    assert step.name == "optimiser step"
    assert step.parameters == nbytes(student.parameters())
    assert step.gradients == nbytes(p.grad for p in student.parameters() if p.grad is not None)
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert step.optimiser == nbytes(moments)
    assert step.teacher == nbytes(teacher.parameters())


def named(job: Job, name: str) -> Phase:
    return next(phase for phase in phases(job) if phase.name == name)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------- activations


def saved_bytes(model: torch.nn.Module, half: bool) -> int:
    """Bytes that the student's forward to its final norm saves for its backward; parameters and vectors left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(97, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if half else nullcontext(),
    ):
        final_hidden(model, ids)
    return sum(found.values())


@pytest.mark.parametrize("way", ["kept", "tiled", "recomputed"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixer", ["mla", "mla-qk-norm", "gated_deltanet", "mamba2"])
def test_what_a_forward_saves(tmp_path: Path, mixer: str, half: bool, way: str) -> None:
    kind = mixer.removesuffix("-qk-norm")
    dims = config(kind, kind, qk_norm=kind != mixer)
    model = hylo.HyloForCausalLM(dims).train()
    tile = 100 if way == "tiled" else None
    options = {"activation_checkpointing": way == "recomputed", "mlp_tile_tokens": tile}
    (stage,) = parse_recipe(recipe_values(tmp_path, {"name": "stage", "kind": "ce", **options})).stages
    spare_memory(stage, model, None)
    job = make_job(dims, half=half, checkpointing=way == "recomputed", tile=tile)
    beside = named(job, "loss").weight_copies
    if way == "recomputed" and kind == "mla":
        beside -= 2 * 4 * LENGTH * 2  # cos and sin are arguments of the layers and no saved tensors
    assert saved_bytes(model, half) == pytest.approx(kept_for_backward(job) + beside, rel=0.01)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mixer", ["mla", "mla-qk-norm", "gated_deltanet"])
def test_what_selective_checkpointing_keeps_beside_the_streams(mixer: str, half: bool) -> None:
    """To the byte: what is alive behind a forward beyond what is where attention runs again too."""
    kind = mixer.removesuffix("-qk-norm")
    dims = config(kind, "mamba2", kind, qk_norm=kind != mixer)
    alive, formulas = [], []
    for way in (True, "selective"):
        model = hylo.HyloForCausalLM(dims).train()
        recompute_layers(model, keep_attention=way == "selective")
        with CountBytes() as counted, torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = final_hidden(model, torch.arange(LENGTH)[None] % 97)
        counted.take()
        alive.append(counted.take())
        del hidden
        formulas.append(kept_for_backward(make_job(dims, half=half, checkpointing=way)))
    assert alive[1] - alive[0] == formulas[1] - formulas[0]
    assert (formulas[1] > formulas[0]) == (kind == "mla")


class WeightCopies(TorchDispatchMode):
    """What becomes of the 16-bit copies of a model's parameters, alone or below each other."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._parameters = {id(p) for p in model.parameters()}
        self._copies: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if copied is not None and id(args[copied]) in self._parameters:
            self._copies.append(weakref.ref(result.untyped_storage()))
        return result

    def made_and_alive(self) -> tuple[int, int]:
        return len(self._copies), sum(copy() is not None for copy in self._copies)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_copies_of_weights_that_no_backward_reads_are_gone_at_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool
) -> None:
    dims = config("gated_deltanet", "mla")
    student, teacher = hylo.HyloForCausalLM(dims).train(), hylo.HyloForCausalLM(dims).requires_grad_(False)
    values = {"name": "stage", "kind": kind, "activation_checkpointing": checkpointing}
    (stage,) = parse_recipe(recipe_values(tmp_path, values)).stages
    spare_memory(stage, student, teacher)
    name = {"ce": "cross_entropy_loss", "kl": "kl_loss"}[kind]
    compute, seen = getattr(objectives, name), []

    def at_the_loss(*args: Any, **options: Any) -> Tensor:
        seen.append(copies.made_and_alive())
        return compute(*args, **options)

    monkeypatch.setattr(objectives, name, at_the_loss)
    with WeightCopies(student) as copies:
        ids = torch.arange(20).view(2, 10)
        (term,) = loss_terms(stage, student, teacher, ids, lambda: torch.autocast("cpu", torch.bfloat16))
        term.backward()
    products = sum(isinstance(m, torch.nn.Linear) for m in student.model.modules()) - 1  # MLA's keys come by an einsum
    assert seen == [(products, 0 if checkpointing else products)]


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(("path", "index"), STAGES, ids=STAGE_IDS)
def test_every_recipe_has_its_memory(path: Path, index: int) -> None:
    job = stage_job(load_recipe(path), index)
    for phase in phases(job):
        assert phase.parameters > 0
        assert min(vars(phase)[part] for part in vars(phase) if part != "name") >= 0
    for choice in choices(job).values():
        for longer in (replace(choice, length=2 * job.length), replace(choice, batch=job.batch + 1)):
            pairs = zip(phases(choice), phases(longer), strict=True)
            assert all(one.total <= other.total for one, other in pairs)
            assert peak(longer).total > peak(choice).total or peak(longer).name == "optimiser step"
    assert peak(replace(job, gpus=8)).total < peak(job).total


@pytest.mark.parametrize(("path", "index"), STAGES, ids=STAGE_IDS)
def test_each_way_to_spare_memory_spares_some(path: Path, index: int) -> None:
    job = replace(stage_job(load_recipe(path), index), batch=1, length=65536)
    found = choices(job)
    between = {name: found.pop(name) for name in [*found] if name.startswith("selective")}
    totals = [peak(choice).total for choice in found.values()]
    assert totals == sorted(totals, reverse=True)
    for name, choice in between.items():
        less, more = (found[name.replace("selective", other)] for other in ("all kept", "checkpointing"))
        assert peak(less).total > peak(choice).total >= peak(more).total
        assert named(less, "backward").total > named(choice, "backward").total > named(more, "backward").total
    backward = [named(choice, "backward").total for choice in found.values()]
    assert backward == sorted(backward, reverse=True)
    assert len(set(backward)) >= len(backward) - 1, "tiles spare nothing where the mixer's backward is the fullest"


def test_gradients_come_with_the_backward_of_the_first_micro_batch() -> None:
    job = make_job(config("mla", "mamba2"), cuda=True)
    first, later = phases(job), phases(replace(job, accumulates=True))
    assert [phase.gradients for phase in first][:2] == [0, 0]
    assert {phase.gradients for phase in later} == {first[-1].gradients} == {4 * parameter_counts(job.student).total}


# ---------------------------------------------------------------- several GPUs


def test_what_each_of_several_gpus_holds() -> None:
    """Of four; shares of all, and whole what the pass at hand or those before it have made whole."""
    dims = config("gated_deltanet", "mla", "mamba2")
    counts, gpus = parameter_counts(dims), 4
    table, layer, total = counts.embedding + counts.head, max(counts.layers), counts.total
    job = make_job(dims, kind="kl", teacher=dims, half=True, checkpointing=True, gpus=gpus, accumulates=True)
    found = {phase.name: phase for phase in phases(job)}
    gathered = {
        "teacher forward": 0, "student forward": table + 2 * layer, "loss": table, "loss backward": table,
        "backward": table + 2 * layer, "embedding backward": table, "optimiser step": 0,
    }  # fmt: skip
    assert {name: phase.parameters for name, phase in found.items()} == {
        name: 4 * total // gpus + 4 * more for name, more in gathered.items()
    }
    assert {phase.optimiser for phase in found.values()} == {8 * total // gpus}
    assert found["optimiser step"].teacher == 2 * total // gpus + 2 * table
    assert found["optimiser step"].gradients == 4 * (total // gpus)
    assert {found[name].gradients for name in ("teacher forward", "student forward", "loss")} == {4 * total}
    assert found["embedding backward"].gradients == 4 * (2 * table + (total - table) // gpus)
    assert found["student forward"].weight_copies == 0
    once = {phase.name: phase for phase in phases(replace(job, accumulates=False))}
    assert {once[name].gradients for name in ("teacher forward", "student forward", "loss")} == {0}
    assert once["backward"].gradients < found["backward"].gradients <= 4 * (total + layer)


def test_alignment_on_several_gpus_gathers_no_root_of_the_student() -> None:
    dims = config("mla", "mla")
    counts = parameter_counts(dims)
    job = make_job(dims, kind="ild", teacher=dims, gpus=2)
    backward = named(job, "backward")
    layer = max(counts.layers)
    assert backward.parameters == 4 * counts.total // 2 + 8 * layer
    assert backward.teacher >= 4 * counts.total // 2 + 4 * (counts.embedding + counts.head) + 4 * layer


@pytest.mark.parametrize(("gpus", "batch", "accumulates"), [(1, 2, True), (2, 2, True), (4, 2, False), (8, 1, False)])
def test_a_step_is_shared_out_among_the_gpus(tmp_path: Path, gpus: int, batch: int, accumulates: bool) -> None:
    """Of four passes of two sequences each GPU has its share, and passes `batch_size` of it at a time."""
    hybrid = config("mla", "mamba2", vocab_size=258)
    hybrid.save_pretrained(tmp_path / "student")
    stage = {"name": "stage", "kind": "ce", "batch_size": 2, "gradient_accumulation": 4}
    job = stage_job(parse_recipe(recipe_values(tmp_path, stage, teacher=None)), 0, gpus=gpus)
    assert (job.batch, job.accumulates) == (batch, accumulates)


# ---------------------------------------------------------------- command line


def test_the_command_prints_what_the_formulas_say(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ["--stage", "1", "--gpus", "2", "--length", "65536", "--batch", "1", "--gpu-gib", "141"]
    code, out, error = run(monkeypatch, capsys, "memory", RECIPES[0], *options)
    assert (code, error) == (0, "")
    most = peak(stage_job(load_recipe(RECIPES[0]), 1, gpus=2, length=65536, batch=1))
    assert "1 x 65536 tokens, checkpointing, shared by 2 GPUs" in out
    assert f"{most.total / 2**30:.2f}" in out
    assert f"{141 - most.total / 2**30:.2f}" in out
    assert "latent cache" in out
    assert "stage align" not in out


@pytest.mark.parametrize("path", RECIPES, ids=LAYOUTS)
def test_a_narrow_terminal_cuts_no_word(monkeypatch: Any, capsys: Any, path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(monkeypatch, capsys, "memory", path)
    assert code == 0
    assert "…" not in out
    assert "weight copies" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "3"], "there is no stage 3: recipe 'llama-3.2-1b-4mla12gdn-8k-64k' has stages 0 to 2"),
        (["--stage", "-1"], "there is no stage -1"),
        (["--set", "stages.1.kind=kd"], "kd"),
    ],
)
def test_the_command_refuses(monkeypatch: Any, capsys: Any, options: list[str], message: str) -> None:
    code, out, error = run(monkeypatch, capsys, "memory", RECIPES[0], *options)
    assert code == 2
    assert message in one_sentence(error)
    assert out == ""


def test_a_student_that_is_no_hybrid_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path / "student")
    recipe = parse_recipe(recipe_values(tmp_path, {"name": "stage", "kind": "ce"}, teacher=None))
    with pytest.raises(UserError, match="no memory formula for a student of type 'llama', only for hybrids"):
        stage_job(recipe, 0)
