"""Training losses against their plain formulas in float64, and what they need to know about a model's layers."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hylo import HyloConfig, HyloForCausalLM
from hylo.distill.engine import spare_memory
from hylo.distill.layers import final_hidden
from hylo.distill.losses import cross_entropy_loss, kl_loss
from hylo.distill.objectives import alignment_terms, loss_terms
from hylo.distill.recipe import parse_recipe
from hylo.distill.table import choose_trainable, parameter_groups
from hylo.distill.tiling import tile_mlps
from hylo.errors import UserError
from hylo_ops.linear_kl import chunked
from tests.distill_fixtures import recipe_values

# ---------------------------------------------------------------- losses


def head_case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student [2, 9, 6] with head [31, 6], teacher [2, 9, 10] with head [31, 10], float64."""
    make = torch.Generator().manual_seed(seed)
    shapes = ((2, 9, 6), (31, 6), (2, 9, 10), (31, 10))
    hidden, weight, teacher, matrix = (torch.randn(*shape, generator=make, dtype=torch.float64) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, matrix


def naive_kl(hidden: Tensor, weight: Tensor, teacher: Tensor, matrix: Tensor) -> Tensor:
    log_student = (hidden @ weight.T).log_softmax(-1)
    log_teacher = (teacher @ matrix.T).log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1).mean()


@pytest.mark.parametrize("chunk", [1, 5, 18, 100])
def test_kl_equals_full_logits(chunk: int) -> None:
    hidden, weight, teacher, matrix = head_case()
    expected = naive_kl(hidden, weight, teacher, matrix)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss = kl_loss(hidden, weight, teacher, matrix, chunk_tokens=chunk)
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_cross_entropy_equals_full_logits(chunk: int) -> None:
    hidden, weight, _, _ = head_case()
    labels = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = (hidden @ weight.T)[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, (hidden, weight))
    loss = cross_entropy_loss(hidden, weight, labels, chunk_tokens=chunk)
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_kl_with_all_its_options() -> None:
    """Reverse, at a temperature, and the cross-entropy of the same logits at temperature 1."""
    hidden, weight, teacher, matrix = head_case()
    labels = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = naive_kl(teacher, matrix / 2, hidden, weight / 2)
    expected = expected + 0.3 * F.cross_entropy((hidden @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = kl_loss(
        hidden, weight, teacher, matrix, chunk_tokens=5, temperature=2, direction="reverse", labels=labels,
        ce_weight=0.3,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    got, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_kl_is_zero_with_zero_gradient_where_student_is_teacher() -> None:
    hidden, weight, _, _ = head_case()
    loss = kl_loss(hidden, weight, hidden, weight, chunk_tokens=4)
    assert abs(loss.item()) < 1e-14
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-15


def test_kl_weighs_by_the_teacher_and_reaches_only_the_student() -> None:
    hidden, weight, teacher, matrix = head_case()
    teacher.requires_grad_()
    loss = kl_loss(hidden, weight, teacher, matrix, chunk_tokens=4)
    loss.backward()
    assert teacher.grad is None
    other_way = naive_kl(teacher, matrix, hidden, weight)
    assert abs(loss.item() - other_way.item()) > 0.01


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, teacher, matrix = head_case()
    expected = torch.autograd.grad(naive_kl(hidden, weight, teacher, matrix), hidden)[0]
    kl_loss(hidden, weight.detach(), teacher, matrix, chunk_tokens=4).backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-11, atol=1e-14)


def test_losses_hold_the_logits_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size | None] = []
    rows = chunked.rows

    def recording(student: Tensor, teacher: Tensor | None, *others: Any) -> Tensor:
        shapes.extend(None if logits is None else logits.shape for logits in (student, teacher))
        return rows(student, teacher, *others)

    monkeypatch.setattr(chunked, "rows", recording)
    hidden, weight, teacher, matrix = head_case()
    kl_loss(hidden, weight, teacher, matrix, chunk_tokens=9)
    cross_entropy_loss(hidden, weight, torch.zeros(2, 9, dtype=torch.int64), chunk_tokens=9)
    assert shapes == [(9, 31), (9, 31)] * 2 + [(9, 31), None] * 2


def test_bf16_autocast_stays_near_float32() -> None:
    hidden, weight, teacher, matrix = (x.detach().float() for x in head_case())
    expected = kl_loss(hidden, weight, teacher, matrix, chunk_tokens=4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = kl_loss(hidden, weight, teacher, matrix, chunk_tokens=4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert loss.item() != expected.item()


# ---------------------------------------------------------------- layer-wise alignment


def llama(seed: int, *, intermediate_size: int = 24) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=intermediate_size, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def naive_alignment(student: Any, teacher: Any, ids: Tensor, mixer_weight: float) -> Tensor:
    """Every layer by hand on the teacher's recorded states, summed into one loss."""
    mixed: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _m, _i, out: mixed.append(out[0]))
        for layer in teacher.model.layers
    ]
    with torch.no_grad():
        states = teacher.model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    positions = torch.arange(ids.shape[1])[None]
    rotation = student.model.rotary_emb(states[0], positions)
    total = torch.zeros((), dtype=torch.float64)
    for index, layer in enumerate(student.model.layers):
        normed = layer.input_layernorm(states[index])
        attention = layer.self_attn(normed, position_embeddings=rotation, attention_mask=None)[0]
        middle = states[index] + attention
        output = middle + layer.mlp(layer.post_attention_layernorm(middle))
        if index == 2:
            output = student.model.norm(output)
        total = total + (output - states[index + 1]).pow(2).sum(-1).sqrt().mean()
        total = total + mixer_weight * (attention - mixed[index]).pow(2).sum(-1).sqrt().mean()
    return total


@pytest.mark.parametrize("mixer_weight", [1.0, 0.25, 0.0])
def test_alignment_equals_direct_computation(mixer_weight: float) -> None:
    student, teacher = llama(1), llama(2)
    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(3))
    expected = naive_alignment(student, teacher, ids, mixer_weight)
    expected.backward()
    wanted = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    total = 0.0
    for term in alignment_terms(student, teacher, ids, mixer_weight, torch.enable_grad):
        term.backward()
        total += term.item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in student.named_parameters():
        if wanted[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-10, atol=1e-12)
    assert wanted["model.norm.weight"] is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_alignment_layers_are_independent() -> None:
    """Perturbing the first student layer leaves the terms of the others alone: they see the teacher's states."""
    student, teacher = llama(1), llama(2)
    ids = torch.arange(12).view(1, 12)

    def terms() -> list[float]:
        return [t.item() for t in alignment_terms(student, teacher, ids, 1.0, torch.enable_grad)]

    before = terms()
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = terms()
    assert before[0] != after[0]
    assert before[1:] == after[1:]


def test_alignment_of_equal_models_is_zero_and_differentiable() -> None:
    student, teacher = llama(1), llama(1)
    for term in alignment_terms(student, teacher, torch.arange(12).view(1, 12), 1.0, torch.enable_grad):
        assert term.item() == 0
        term.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


# ---------------------------------------------------------------- distillation


@pytest.mark.parametrize(
    ("options", "temperature", "ce_weight"),
    [({}, 1, 0), ({"temperature": 2, "ce_weight": 0.3}, 2, 0.3)],
)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_stage_distils_as_its_recipe_says(
    tmp_path: Path, options: dict[str, float], temperature: float, ce_weight: float, direction: str
) -> None:
    """From both models' own logits."""
    values = recipe_values(tmp_path, {"name": "kl", "kind": "kl", "direction": direction, **options})
    (stage,) = parse_recipe(values).stages
    student, teacher = llama(1), llama(2)
    ids = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(3))
    logits, theirs = student(ids).logits, teacher(ids).logits
    log_q, log_p = ((z / temperature).log_softmax(-1) for z in (logits, theirs))
    if direction == "reverse":
        log_q, log_p = log_p, log_q
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = expected + ce_weight * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (loss,) = loss_terms(stage, student, teacher, ids, torch.enable_grad)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    got, wanted = (torch.autograd.grad(x, list(student.parameters())) for x in (loss, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------- hybrid students


def hybrid(base: LlamaForCausalLM, **changes: Any) -> HyloForCausalLM:
    """A random hybrid of the base's dims: Mamba2, MLA, Gated DeltaNet."""
    config = HyloConfig(
        vocab_size=40, hidden_size=16, intermediate_size=base.config.intermediate_size, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, mixer_types=["mamba2", "mla", "gated_deltanet"],
        q_lora_rank=8, kv_lora_rank=4, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=4, linear_num_heads=2,
        linear_key_head_dim=4, linear_value_head_dim=8, rms_norm_eps=1e-6, **changes,
    )  # fmt: skip
    torch.manual_seed(5)
    student = HyloForCausalLM(config).to(base.dtype)
    student.load_state_dict(base.state_dict(), strict=False)
    return student


def test_hybrid_layers_align_to_the_base() -> None:
    """Each term equals the layer run inside the whole hybrid, when the teacher's states are put in its place."""
    teacher = llama(2)
    student = hybrid(teacher)
    ids = torch.randint(40, (2, 13), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = teacher.model(ids, output_hidden_states=True).hidden_states
    leaving: list[Tensor] = []
    for index, layer in enumerate(student.model.layers):
        layer.register_forward_pre_hook(lambda _m, args, i=index: (states[i], *args[1:]))
        layer.register_forward_hook(lambda _m, _args, out: leaving.append(out))
    with torch.no_grad():
        final = student.model(ids).last_hidden_state
    outputs = [*leaving[:2], final]
    expected = [(out - states[i + 1]).norm(dim=-1).mean().item() for i, out in enumerate(outputs)]
    got = [t.item() for t in alignment_terms(student, teacher, ids, 0.0, torch.enable_grad)]
    assert got == pytest.approx(expected, rel=1e-6)


def test_activation_checkpointing_recomputes_every_mixer_and_mlp() -> None:
    student = hybrid(llama(2)).train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    calls: Counter[tuple[str, int]] = Counter()
    for index, layer in enumerate(student.model.layers):
        for part in ("mixer", "mlp"):
            layer.get_submodule(part).register_forward_pre_hook(lambda _m, _a, at=(part, index): calls.update([at]))
    final_hidden(student, torch.arange(10).view(1, 10)).sum().backward()
    assert calls == {(part, index): 2 for part in ("mixer", "mlp") for index in range(3)}


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_neither_model_runs_its_head(tmp_path: Path, kind: str) -> None:
    """Both end at the hidden states: what the loss needs of a head is its weight."""

    def refuse(*_: Any) -> None:
        raise AssertionError("logits of a whole sequence")

    teacher = llama(2)
    student = hybrid(teacher)
    for model in (student, teacher):
        model.lm_head.register_forward_pre_hook(refuse)
    (stage,) = parse_recipe(recipe_values(tmp_path, {"name": "stage", "kind": kind})).stages
    (loss,) = loss_terms(stage, student, teacher, torch.arange(20).view(2, 10), torch.enable_grad)
    loss.backward()
    assert student.lm_head.weight.grad.abs().sum() > 0


class WidestTensor(TorchDispatchMode):
    """Rows of the largest tensor [rows, width] that any operator makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return result


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["kl", "ild"])
def test_tiled_mlps_train_alike_and_never_see_a_whole_sequence(tmp_path: Path, kind: str, recomputed: bool) -> None:
    """80 tokens in tiles of 27: no tensor of the MLPs' width has more rows, neither student's nor teacher's."""
    options = {"activation_checkpointing": recomputed} if kind == "kl" else {}
    ids = torch.randint(40, (2, 40), generator=torch.Generator().manual_seed(3))
    found = {}
    for tile in (None, 27):
        values = recipe_values(tmp_path, {"name": "stage", "kind": kind, "mlp_tile_tokens": tile, **options})
        (stage,) = parse_recipe(values).stages
        # Only the MLPs are 29 wide; the gradient of a weight [16, 29] has fewer rows than a tile.
        teacher = llama(2, intermediate_size=29).eval()
        student = hybrid(teacher).train()
        spare_memory(stage, student, teacher)
        with WidestTensor(29) as widest:
            terms = []
            for term in loss_terms(stage, student, teacher, ids, torch.enable_grad):
                term.backward()
                terms.append(term.detach())
        found[tile] = torch.stack(terms), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        assert widest.rows == (tile or 80)
    torch.testing.assert_close(found[27], found[None], rtol=1e-10, atol=1e-13)


def test_tiles_larger_than_the_batch_change_nothing() -> None:
    student, ids = hybrid(llama(2)), torch.arange(10).view(1, 10)
    expected = final_hidden(student, ids)
    tile_mlps(student, 10)
    assert torch.equal(final_hidden(student, ids), expected)


def test_a_tiled_model_goes_with_its_last_reference() -> None:
    """The next stage's models find its memory free; no collector has to come first."""
    gc.disable()
    try:
        student = hybrid(llama(2))
        tile_mlps(student, 7)
        final_hidden(student, torch.arange(10).view(1, 10)).sum().backward()
        mlp = weakref.ref(student.model.layers[0].mlp)
        del student
        assert mlp() is None
    finally:
        gc.enable()


def test_hybrid_groups_name_their_mixers() -> None:
    groups = parameter_groups(hybrid(llama(2)))
    assert {"mixer Mamba2", "mixer MultiHeadLatentAttention", "mixer GatedDeltaNet"} < set(groups)


def test_trainable_patterns_and_table() -> None:
    model = llama(0)
    choose_trainable(model, [r"self_attn", r"layers\.2\."])
    groups = parameter_groups(model)
    assert groups["mixer LlamaAttention"].trainable == groups["mixer LlamaAttention"].parameters == 3 * 768
    assert groups["mlp"].trainable * 3 == groups["mlp"].parameters
    assert groups["embed_tokens"].trainable == 0
    assert sum(group.parameters for group in groups.values()) == model.num_parameters()
    with pytest.raises(UserError, match="trainable pattern 'no_such' is found in no parameter"):
        choose_trainable(model, ["no_such"])
