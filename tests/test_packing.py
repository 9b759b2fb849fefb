"""Packed weights and sums in place: fewer launches, the same numbers, and nothing that a user of the model can tell."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from hylo.mixers import packing
from hylo.mixers.packing import pack_, packed, project, stacked
from hylo_ops import fused
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
    monkeypatch.setattr(fused, "gated_delta_rule_step", lambda *a: (calls.append(a), original(*a))[1])
    ids = tokens(2, 8)
    whole = model(ids, use_cache=False).logits
    assert calls == []
    cache = model(ids[:, :7], use_cache=True).past_key_values
    assert calls == []
    last = model(ids[:, 7:], past_key_values=cache).logits
    assert len(calls) == 2
    torch.testing.assert_close(last, whole[:, 7:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wanted", [True, False], ids=["input", "weights"])
def test_a_copy_that_products_share_changes_no_bit(monkeypatch, wanted):
    """Outputs and gradients as with a cast of its own for each product, which rounds sums of gradients nowhere."""
    layers = [nn.Linear(6, n, bias=False) for n in (5, 2, 4)]
    x = torch.randn(3, 7, 6, requires_grad=wanted).clone()  # no leaf, whose cast autocast would keep for all

    def run():
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            outputs = project(x, layers[:2], layers[2:])
        leaves = [*weights(layers), *[x] * wanted]
        grads = torch.autograd.grad([o.float().square().sum() for o in outputs], leaves)
        copies = {t.data_ptr() for t in kept.values() if t.dtype == torch.bfloat16 and t.numel() == x.numel()}
        return [*outputs, *grads], len(copies)

    shared, copies = run()
    monkeypatch.setattr(packing, "reader", lambda x: lambda: x)
    apart, more = run()
    assert (copies, more) == (1, 3)
    for got, want in zip(shared, apart, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_autocast_leaves_as_it_is_is_not_copied(dtype):
    x = torch.randn(3, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert packing.reader(x)() is x


@pytest.mark.parametrize("layout", ["gdn", "mamba2"])
def test_training_with_shared_copies_is_the_same_to_the_bit(monkeypatch, layout):
    model = make_model(layout, dtype=torch.float32).train()

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        return loss, *(parameter.grad for parameter in model.parameters())

    shared = run()
    monkeypatch.setattr(packing, "reader", lambda x: lambda: x)
    for got, want in zip(shared, run(), strict=True):
        assert torch.equal(got, want)
