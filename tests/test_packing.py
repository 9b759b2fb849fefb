"""Packed weights and sums in place: fewer launches, the same numbers, and nothing that a user of the model can tell."""

import copy
import gc
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from hylo.distill.tiling import tile_mlps
from hylo.mixers import packing
from hylo.mixers.packing import Normed, pack_, packed, project, stacked
from hylo_ops import fused, recurrent_causal_conv1d, skinny_linear, skinny_linear_add_
from hylo_ops.testing import within_budget
from tests.test_model import make_model, tokens


def linears(*rows, width=6):
    torch.manual_seed(0)
    return [nn.Linear(width, n, bias=False, dtype=torch.float64) for n in rows]


def weights(layers):
    return [layer.weight for layer in layers]


def pack_all(model):
    for module in model.modules():
        if module is not model and hasattr(module, "pack_"):
            module.pack_()


@torch.no_grad()
def test_one_product_gives_what_several_gave(monkeypatch):
    a, b, c = layers = linears(5, 2, 4)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    before = [torch.cat([a(x), b(x)], -1), c(x)]
    assert packed(weights(layers)) is None
    pack_(weights(layers))
    products, linear = [], nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: (products.append(args), linear(*args))[1])
    found = project(x, (a, b), (c,))
    assert len(products) == 1
    for got, want in zip(found, before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
        assert got.stride(1) == 16  # 11 columns, and up to the next multiple of 8


@torch.no_grad()
def test_a_layer_that_is_more_than_its_weight_is_asked_itself():
    """An adapter that came after packing."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers = linears(5, 3)
    pack_(weights(layers))
    x = torch.randn(3, 6, dtype=torch.float64)
    (want,) = project(x, layers[:1])
    layers[0].__class__ = Doubled
    torch.testing.assert_close(project(x, layers[:1], layers[1:])[0], 2 * want)


@torch.no_grad()
def test_stacked_weights_are_a_view_once_packed():
    layers = linears(3, 5)
    apart = stacked(weights(layers))
    pack_(weights(layers))
    together = stacked(weights(layers))
    assert torch.equal(apart, together)
    assert together.data_ptr() == layers[0].weight.data_ptr()
    layers[1].weight[0, 0] = 9.0
    assert together[3, 0] == 9.0


def test_each_weight_gets_its_gradient():
    layers = linears(3, 5)
    pack_(weights(layers))
    assert packed(weights(layers)) is None
    sum(part.sum() for part in project(torch.ones(1, 6, dtype=torch.float64), layers[:1], layers[1:])).backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.all() for layer in layers)


@torch.no_grad()
@pytest.mark.parametrize("change", ["moved", "swapped", "replaced", "neighbours", "end"])
def test_weights_that_lie_apart_are_found_apart(change):
    """Also two that touch by chance, in no storage of their own making."""
    layers = linears(3, 5)
    pack_(weights(layers))
    assert packed(weights(layers)) is not None
    if change == "moved":
        for layer in layers:
            layer.to(torch.float32)
    elif change == "swapped":
        layers.reverse()
    elif change == "replaced":
        layers[1].weight = nn.Parameter(torch.ones(5, 6, dtype=torch.float64))
    elif change == "neighbours":
        layers[1].weight.data = torch.ones(5, 7, dtype=torch.float64)[:, :6]
    else:
        whole = torch.ones(7, 6, dtype=torch.float64)  # no room for the eighth row
        layers[0].weight.data, layers[1].weight.data = whole[:3], whole[3:]
    assert packed(weights(layers)) is None


@torch.no_grad()
@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_a_layer_adds_in_place_what_it_adds_elsewhere(layout):
    model = make_model(layout)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    positions = model.model.rotary(torch.arange(5)[None], x.dtype)
    for layer in model.model.layers:
        want = layer(x, position_embeddings=positions)
        assert want is not x
        room = x.clone()
        assert layer(room, position_embeddings=positions, in_place=True) is room
        torch.testing.assert_close(room, want, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["gdn", "mamba2", "linear"])
def test_a_packed_model_is_the_same_model(tmp_path, layout):
    model = make_model(layout, torch.float32, qk_norm=True)
    plain = copy.deepcopy(model)
    pack_all(model)
    ids = tokens(2, 9)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for part in ids.split([6, 1, 2], dim=1):
        got, want = (m(part, past_key_values=c).logits for m, c in zip((model, plain), caches, strict=True))
        torch.testing.assert_close(got, want)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


@torch.no_grad()
def test_gated_deltanet_decodes_in_one_fused_step(monkeypatch):
    model, calls, original = make_model("gdn"), [], fused.gated_delta_rule_step
    monkeypatch.setattr(fused, "gated_delta_rule_step", lambda *a, **k: (calls.append(a), original(*a, **k))[1])
    ids = tokens(2, 8)
    whole = model(ids, use_cache=False).logits
    assert calls == []
    cache = model(ids[:, :7], use_cache=True).past_key_values
    assert calls == []
    last = model(ids[:, 7:], past_key_values=cache).logits
    assert len(calls) == 2
    torch.testing.assert_close(last, whole[:, 7:], rtol=0, atol=1e-9)


# ---------------------------------------------------------------- few rows on a GPU


@pytest.fixture
def few_rows(monkeypatch):
    """Tensors say that they are on a GPU, and products of few rows note how they are asked for."""
    asked = []

    def noted(op, *args, **options):
        asked.append((op.__name__, options))
        return op(*args, **options, backend="reference")

    for op in (skinny_linear, skinny_linear_add_):
        monkeypatch.setattr(packing, op.__name__, partial(noted, op))
    monkeypatch.setattr(fused, "linear_step", partial(noted, fused.linear_step))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(packing, "autocast_dtype", lambda x: None)
    return asked


def half_layers(*rows, width=32):
    layers = [layer.bfloat16() for layer in linears(*rows, width=width)]
    pack_(weights(layers))
    return layers


@torch.no_grad()
@pytest.mark.parametrize("constant", [False, True])
def test_few_rows_go_by_the_op_that_is_for_them(few_rows, constant):
    gate, up = half_layers(24, 24)
    x, residual = torch.randn(4, 1, 32).bfloat16(), torch.ones(4, 1, 24).bfloat16()

    def all_of_them():
        assert packing.add_product(x, gate, residual) is residual
        return *project(x, (gate,), (up,)), packing.gated_at_once(x, gate, up), packing.product(x, up), residual

    if constant:
        with packing.settled():
            found = all_of_them()
    else:
        found = all_of_them()

    def eager(x, gate, up):
        return gate(x), up(x), nn.functional.silu(gate(x)) * up(x), up(x), 1 + gate(x)

    expected = eager(x.double(), *(copy.deepcopy(layer).double() for layer in (gate, up)))
    for got, theirs, want in zip(found, eager(x, gate, up), expected, strict=True):
        within_budget(got, theirs, want)
    names = [name for name, _ in few_rows]
    assert names == ["skinny_linear_add_", "skinny_linear", "skinny_linear", "skinny_linear"]
    assert all(options["constant_weight"] == constant for _, options in few_rows)
    assert [options.get("swiglu") for _, options in few_rows] == [None, False, True, False]


@torch.no_grad()
def test_a_first_group_is_convolved_in_the_same_op(few_rows):
    q, k, gate = layers = half_layers(8, 12, 16)
    x, conv_weight, state = (
        torch.randn(4, 1, 32).bfloat16(),
        torch.randn(20, 4).bfloat16(),
        torch.randn(4, 20, 4).bfloat16(),
    )
    want_state = state.clone()
    mixed, other = packing.project_convolved(x, conv_weight, state, (q, k), (gate,))
    assert [name for name, _ in few_rows] == ["linear_step"]
    assert (few_rows[0][1]["activation"], few_rows[0][1]["constant_weight"]) == ("silu", False)
    first, want = project(x, (q, k), (gate,))
    torch.testing.assert_close(other, want, rtol=0, atol=0)
    want = recurrent_causal_conv1d(first, conv_weight, None, want_state, activation="silu", backend="reference")
    torch.testing.assert_close(mixed, want, rtol=0.02, atol=0.02)
    torch.testing.assert_close(state, want_state, rtol=0, atol=0)
    many = torch.randn(17, 1, 32).bfloat16(), conv_weight, torch.randn(17, 20, 4).bfloat16()
    assert packing.project_convolved(*many, (q, k), (gate,)) is None
    layers[0].register_forward_hook(lambda *_: None)
    assert packing.project_convolved(x, conv_weight, state, (q, k), (gate,)) is None


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
def test_a_norm_is_made_on_the_way_into_the_product(few_rows, hooked):
    gate, up = half_layers(24, 24)
    norm, x = nn.RMSNorm(32, eps=1e-5).bfloat16(), torch.randn(4, 1, 32).bfloat16()
    norm.weight.copy_(torch.randn(32))
    if hooked:
        norm.register_forward_hook(lambda *_: None)
    found = *project(Normed(x, norm), (gate,), (up,)), packing.gated_at_once(Normed(x, norm), gate, up)
    found = *found, packing.product(Normed(x, norm), up)
    assert [name for name, _ in few_rows] == ["linear_step"] * 3
    assert all(options.get("norm_weight") is (None if hooked else norm.weight) for _, options in few_rows)

    def eager(x, norm, gate, up):
        x = norm(x)
        return gate(x), up(x), nn.functional.silu(gate(x)) * up(x), up(x)

    expected = eager(x.double(), *(copy.deepcopy(layer).double() for layer in (norm, gate, up)))
    for got, theirs, want in zip(found, eager(x, norm, gate, up), expected, strict=True):
        within_budget(got, theirs, want)


@torch.no_grad()
def test_elsewhere_a_norm_is_made_once():
    gate, up = half_layers(24, 24)
    norm, made = nn.RMSNorm(32), []
    norm.register_forward_hook(lambda *_: made.append(None))
    x = Normed(torch.randn(4, 1, 32).bfloat16(), norm.bfloat16())
    for got, layer in zip(project(x, (gate,), (up,)), (gate, up), strict=True):
        torch.testing.assert_close(got, layer(x.tensor()))
    torch.testing.assert_close(packing.product(x, up), up(x.tensor()))
    assert len(made) == 1


@pytest.mark.parametrize(
    "what", ["rows", "none", "width", "wide", "gradient", "compiler", "autocast", "hook", "apart", "cpu"]
)
def test_other_products_are_pytorchs(monkeypatch, few_rows, what):
    layers = gate, up = half_layers(24, 24, width=24 if what == "width" else 32)
    x = torch.randn({"rows": 65, "none": 0}.get(what, 4), 24 if what == "width" else 32).bfloat16()
    if what == "wide":
        x = x.float()
        for layer in layers:
            layer.float()
    elif what == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    elif what == "autocast":
        monkeypatch.setattr(packing, "autocast_dtype", lambda x: torch.float16)
    elif what == "hook":
        for layer in layers:
            layer.register_forward_hook(lambda *_: None)
    elif what == "apart":
        gate.weight, up.weight = (nn.Parameter(layer.weight.float()) for layer in layers)
    elif what == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", False)
    with torch.set_grad_enabled(what == "gradient"):
        if what not in ("apart", "autocast"):
            project(x, (gate,), (up,))
            packing.product(x, up)
        assert packing.gated_at_once(x, gate, up) is None
    assert few_rows == []


# ---------------------------------------------------------------- one product with a gradient


def apart(x, groups):
    """By each layer itself, as autocast has it."""
    return [torch.cat([layer(x) for layer in group], -1) for group in groups]


def results(compute, layers, x, wanted):
    """Outputs, and gradients of x and of the layers' weights where they are wanted."""
    outputs = compute()
    towards = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for o in outputs]
    loss = sum((o.double() * t).sum() for o, t in zip(outputs, towards, strict=True))
    leaves = [leaf for leaf in [x, *weights(layers)] if leaf.requires_grad]
    return outputs, dict(zip(wanted, torch.autograd.grad(loss, leaves), strict=True))


ROWS = {"mixer": ([16, 8, 24], [8], [3], [3]), "mlp": ([48, 48],), "one": ([24],), "odd": ([5], [2, 4])}


@pytest.mark.parametrize("frozen", [None, "x", 0, 1])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_products_with_a_gradient_are_one(monkeypatch, rows, frozen):
    """No further from float64 than products apart; gradients in the dtypes of what they are of."""
    layers = linears(*(n for group in rows for n in group), width=32)
    for layer in layers:
        layer.to(torch.float32)
    parts = iter(layers)
    groups = [[next(parts) for _ in group] for group in rows]
    x = torch.randn(3, 7, 32, requires_grad=frozen != "x")
    names = ["x", *range(len(layers))]
    if isinstance(frozen, int):
        layers[min(frozen, len(layers) - 1)].weight.requires_grad_(False)
    wanted = [name for name, leaf in zip(names, [x, *weights(layers)], strict=True) if leaf.requires_grad]
    exact = copy.deepcopy(layers)
    wide = x.detach().double().requires_grad_(x.requires_grad)
    twins = {id(layer): twin.double() for layer, twin in zip(layers, exact, strict=True)}
    exact_groups = [[twins[id(one)] for one in group] for group in groups]
    expected = results(lambda: apart(wide, exact_groups), exact, wide, wanted)
    products, linear = [], nn.functional.linear
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(lambda: apart(x, groups), layers, x, wanted)
        monkeypatch.setattr(nn.functional, "linear", lambda *args: (products.append(args), linear(*args))[1])
        found = results(lambda: project(x, *groups), layers, x, wanted)
    assert len(products) == 1
    for got, theirs, want in zip(found[0], eager[0], expected[0], strict=True):
        assert got.dtype == torch.bfloat16
        within_budget(got, theirs, want)
    for name in wanted:
        got, theirs, want = found[1][name], eager[1][name], expected[1][name]
        assert (got.dtype, got.is_contiguous()) == (torch.float32, True)
        within_budget(got.bfloat16(), theirs.bfloat16(), want, str(name))


@pytest.mark.parametrize("packed_already", [False, True])
def test_the_function_in_float64_is_the_same_function(packed_already):
    layers = linears(5, 3, 8)
    if packed_already:
        pack_(weights(layers))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def function(x, *rows):
        return packing._products(x, torch.float64, [8, 8], rows)

    assert torch.autograd.gradcheck(function, (x, *weights(layers)))
    for got, want in zip(function(x, *weights(layers)), apart(x, [layers[:2], layers[2:]]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_one_copy_of_the_input_and_one_of_the_weights_wait_for_the_backward():
    layers = [layer.float() for layer in linears(16, 8, 3)]
    x, kept = torch.randn(3, 7, 6, requires_grad=True), {}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        project(x, layers[:2], layers[2:])
    assert {(tuple(t.shape), t.dtype) for t in kept.values()} == {
        ((21, 6), torch.bfloat16),
        ((32, 6), torch.bfloat16),
    }


class Seen(TorchDispatchMode):
    """Products by the shapes of their factors, and the storages of all results that are still alive."""

    def __init__(self):
        super().__init__()
        self.products, self._storages = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products[tuple(tuple(t.shape) for t in args[:2])] += 1
        if isinstance(result, torch.Tensor):
            self._storages.append((tuple(result.shape), result.dtype, weakref.ref(result.untyped_storage())))
        return result

    def alive(self):
        return {(shape, dtype) for shape, dtype, storage in self._storages if storage() is not None}


def trained(checkpointing, tile=None, half=True):
    """Gradients of a model in training, and the products of its forward and of its backward."""
    model = make_model("gdn", torch.float32, intermediate_size=56).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tile is not None:
        tile_mlps(model, tile)
    with Seen() as forward, torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
    with Seen() as backward:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()], forward.products, backward.products


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_layer_that_runs_again_ends_before_its_last_product(half):
    """Of 2 x 21 tokens through four layers; what the product is of is all that its own backward reads."""
    down, up = ((42, 56), (56, 32)), ((42, 32), (32, 112))
    kept, recomputed = trained(False, half=half), trained(True, half=half)
    assert all(map(torch.equal, kept[0], recomputed[0]))
    assert (kept[1][down], recomputed[1][down]) == (4, 4)
    others = 0 if half else 8  # towards the input of gate and up, apart
    assert (kept[2][down], recomputed[2][down]) == (others, others)
    if half:
        assert (kept[2][up], recomputed[2][up]) == (0, 4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_tile_that_runs_again_ends_before_its_last_product(checkpointing):
    """A layer of them runs all again but its last one, whose input is the last thing that it keeps."""
    down, up = ((14, 56), (56, 32)), ((14, 32), (32, 112))
    whole, (gradients, forward, backward) = trained(False), trained(checkpointing, tile=14)
    assert forward[down] == 4 * 3
    assert backward[down] == 4 * 2 * checkpointing
    assert backward[up] == 4 * (3 + 2 * checkpointing)
    for got, want in zip(gradients, whole[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("end", ["backward", "dropped"])
def test_what_waits_for_the_backward_goes_with_it(end):
    """While the graph is still there, and without the collector's help."""
    layers = [layer.float() for layer in linears(16, 8, 3)]
    x = torch.randn(3, 7, 6, requires_grad=True)
    factors = {((21, 6), torch.bfloat16), ((32, 6), torch.bfloat16)}
    gc.disable()
    try:
        with Seen() as seen, torch.autocast("cpu", torch.bfloat16):
            parts = project(x, layers[:2], layers[2:])
            loss = sum(part.float().sum() for part in parts)
        del parts
        assert factors <= seen.alive()
        if end == "backward":
            loss.backward()
        else:
            del loss
        assert not factors & seen.alive()
    finally:
        gc.enable()


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    layers = [layer.float() for layer in linears(16, 8)]
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = project(x, layers)
    once = torch.autograd.grad(y.sum(), [x, *weights(layers)], retain_graph=True)
    again = torch.autograd.grad(y.sum(), [x, *weights(layers)])
    assert all(map(torch.equal, once, again))


def test_joined_gradients_keep_to_16_bytes_where_they_can(monkeypatch):
    """The narrow ones are joined by themselves first, and one that fills all columns is not copied."""
    parts, joins, cat = [torch.randn(4, n) for n in (16, 24, 3, 3)], [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim: (joins.append(tensors), cat(tensors, dim=dim))[1])
    whole = packing._side_by_side(parts, 48)
    assert [[t.shape[1] for t in tensors] for tensors in joins] == [[3, 3, 2], [16, 24, 8]]
    assert torch.equal(whole, nn.functional.pad(cat(parts, dim=1), (0, 2)))
    assert packing._side_by_side(parts[:1], 16) is parts[0]


@pytest.mark.parametrize("what", ["adapter", "hook", "compiler", "float64"])
def test_what_is_more_than_a_weight_is_asked_itself_in_training_too(monkeypatch, what):
    layers = [layer.float() for layer in linears(8, 8)]
    x = torch.randn(3, 6, dtype=torch.float64 if what == "float64" else torch.float32)
    if what == "adapter":
        layers[0] = nn.utils.parametrizations.weight_norm(layers[0])
    elif what == "hook":
        layers[0].register_forward_hook(lambda *_: None)
    elif what == "compiler":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        layers = [layer.double() for layer in layers]
    monkeypatch.setattr(packing, "_products", None)
    with torch.autocast("cpu", torch.bfloat16):
        found = project(x, layers)
        assert torch.equal(found[0], apart(x, [layers])[0])


@torch.no_grad()
def test_without_a_gradient_autocast_casts_an_input_once():
    layers, seen = [layer.float() for layer in linears(8, 8)], []
    for layer in layers:
        layer.forward = lambda x: seen.append(x) or x
    with torch.autocast("cpu", torch.bfloat16):
        project(torch.randn(3, 6), layers[:1], layers[1:])
    assert seen[0] is seen[1]
    assert seen[0].dtype == torch.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_training_at_once_is_no_further_off_than_layer_by_layer(monkeypatch, layout, checkpointing):
    """In bf16 against float64: loss and each gradient."""
    exact = make_model(layout, qk_norm=True).train()
    model = copy.deepcopy(exact).float()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run(model, half=True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected, found = run(exact, half=False), run(model)
    monkeypatch.setattr(packing, "_is_plain", lambda _: False)
    eager = run(model)
    assert not torch.equal(found, eager)
    within_budget(found.bfloat16(), eager.bfloat16(), expected)
