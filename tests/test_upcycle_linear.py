"""Upcycling to Gated DeltaNet and Mamba2: every copied slice, and which head of the base goes where."""

import pytest
import torch

import hylo
from hylo.upcycle import build_hybrid
from hylo.upcycle.base import AttentionWeights
from hylo.upcycle.calibrate import InputMoments
from hylo.upcycle.linear import share_out
from hylo.upcycle.to_gated_deltanet import aligned_gated_deltanet, published_gated_deltanet
from hylo.upcycle.to_mamba2 import aligned_mamba2, published_mamba2
from tests.upcycle_models import make_base, make_config

# bases of the paper: query heads, KV heads, head width, GDN heads; keys are 256 wide and values 512
BACKBONES = {"1B": (32, 8, 64, 6), "3B": (24, 8, 128, 9), "qwen": (16, 8, 128, 6)}


def random_weights(heads, kv_heads, width, d=12):
    shapes = [(heads * width, d), (kv_heads * width, d), (kv_heads * width, d), (d, heads * width)]
    torch.manual_seed(0)
    return AttentionWeights(*(torch.randn(shape, dtype=torch.float64) for shape in shapes), width)


def identity_moments(d, dtype=torch.float64):
    return InputMoments(torch.full((d,), 0.3, dtype=dtype), torch.eye(d, dtype=dtype) + 0.09)


# --- Gated DeltaNet


def fresh_gdn(heads, key, value, d, width=4):
    shapes = {
        "q_proj.weight": (heads * key, d), "k_proj.weight": (heads * key, d), "v_proj.weight": (heads * value, d),
        "g_proj.weight": (heads * value, d), "a_proj.weight": (heads, d), "b_proj.weight": (heads, d),
        "q_conv1d.weight": (heads * key, width), "k_conv1d.weight": (heads * key, width),
        "v_conv1d.weight": (heads * value, width), "A_log": (heads,), "dt_bias": (heads,),
        "o_norm.weight": (value,), "o_proj.weight": (d, heads * value),
    }  # fmt: skip
    torch.manual_seed(3)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_published_gdn_slices(name):
    heads, kv_heads, h, gdn_heads = BACKBONES[name]
    weights, fresh = random_weights(heads, kv_heads, h), fresh_gdn(gdn_heads, 256, 512, 12)
    before = {key: tensor.clone() for key, tensor in fresh.items()}
    state = published_gated_deltanet(weights, fresh)
    rows = gdn_heads * 256
    assert rows == {"1B": 24 * 64, "3B": 18 * 128, "qwen": 12 * 128}[name]
    assert torch.equal(state["q_proj.weight"], weights.q[:rows])
    groups = heads // kv_heads
    for row in (0, 5, h, groups * h - 1, groups * h, rows - 1):
        source = row // h // groups * h + row % h
        assert torch.equal(state["k_proj.weight"][row], weights.k[source])
        assert torch.equal(state["v_proj.weight"][row], weights.v[source])
    filled = heads * h
    assert filled == {"1B": 2048, "3B": 3072, "qwen": 2048}[name]
    last = filled - 1
    assert torch.equal(state["v_proj.weight"][last], weights.v[kv_heads * h - 1])
    assert torch.equal(state["o_proj.weight"][:, :filled], weights.o)
    assert torch.equal(state["v_proj.weight"][filled:], before["v_proj.weight"][filled:])
    assert torch.equal(state["o_proj.weight"][:, filled:], before["o_proj.weight"][:, filled:])
    untouched = set(state) - {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"}
    assert all(torch.equal(state[key], before[key]) for key in untouched)
    assert all(torch.equal(fresh[key], before[key]) for key in fresh)


def test_fresh_decays_are_finite():
    base = make_base()
    hybrid, _ = build_hybrid(base, make_config(base, mla_layers=[], linear_num_heads=500))
    for layer in hybrid.model.layers:
        rates = layer.mixer.A_log.exp()
        assert rates.isfinite().all()
        assert rates.min() > 0
        assert rates.max() < 16
        steps = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert steps.min() > 0.9e-3
        assert steps.max() < 0.11


@pytest.mark.parametrize("name", BACKBONES)
def test_aligned_gdn_keeps_heads_together_and_drops_none(name):
    heads, kv_heads, h, gdn_heads = BACKBONES[name]
    weights, groups = random_weights(heads, kv_heads, h), heads // kv_heads
    config = hylo.HyloConfig(
        num_hidden_layers=1, linear_num_heads=gdn_heads, linear_key_head_dim=256, linear_value_head_dim=512
    )
    state = aligned_gated_deltanet(weights, fresh_gdn(gdn_heads, 256, 512, 12), config, identity_moments(12))
    q, k = (state[f"{part}_proj.weight"].view(gdn_heads, -1, h, 12) for part in "qk")
    v = state["v_proj.weight"].view(gdn_heads, -1, h, 12)
    taps = state["v_conv1d.weight"].view(gdn_heads, -1, h, 4)
    values = weights.per_head(weights.v)
    shares = share_out(heads, gdn_heads)
    assert sorted(head for share in shares for head in share) == list(range(heads))
    for head, share in enumerate(shares):
        sources = sorted({member // groups for member in share})
        slots = q.shape[1]
        for slot, part in enumerate(share_out(len(share), slots)):
            members = [share[i] for i in part] if len(share) > slots else [share[slot % len(share)]]
            torch.testing.assert_close(q[head, slot], weights.per_head(weights.q)[members].mean(0))
            owners = [member // groups for member in members]
            torch.testing.assert_close(k[head, slot], weights.per_head(weights.k)[owners].mean(0))
        assert torch.equal(v[head, : len(sources)], values[sources])
        assert torch.equal(v[head, len(sources)], values[sources[0]])
        assert (taps[head, : len(sources), :, -1] == 1).all()
        assert (taps[head, len(sources), :, -2] == 1).all()
    assert (taps.sum(-1) == 1).all()
    for part in "qk":
        assert torch.equal(
            state[f"{part}_conv1d.weight"], torch.tensor([0, 0, 0, 1.0]).expand(gdn_heads * 256, 4).double()
        )
    rates = torch.nn.functional.softplus(state["dt_bias"]) * state["A_log"].exp()
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02)
    assert (rates[1:] < rates[:-1]).all()
    assert not state["o_proj.weight"].any()


def test_open_gate_is_near_one_where_the_inputs_have_a_common_direction():
    torch.manual_seed(0)
    x = torch.randn(4000, 16, dtype=torch.float64) * 0.2 + 1
    moments = InputMoments(x.mean(0), x.T @ x / len(x))
    fresh = {name: tensor * 0.01 for name, tensor in fresh_gdn(2, 8, 16, 16).items()}
    config = hylo.HyloConfig(num_hidden_layers=1, linear_num_heads=2, linear_key_head_dim=8, linear_value_head_dim=16)
    state = aligned_gated_deltanet(random_weights(4, 2, 4, d=16), fresh, config, moments)
    gate = torch.nn.functional.silu(x @ state["g_proj.weight"].T)
    assert (gate.mean() - 1).abs() < 0.05
    assert gate.std() < 0.2


@pytest.mark.parametrize(("key", "value", "heads"), [(4, 6, 3), (8, 8, 16), (64, 24, 1), (16, 16, 8)])
def test_aligned_gdn_fits_any_widths(key, value, heads):
    """Narrower than a head of the base, more heads than the base has, fewer value slots than KV heads."""
    weights = random_weights(8, 4, 8)
    config = hylo.HyloConfig(
        num_hidden_layers=1, linear_num_heads=heads, linear_key_head_dim=key, linear_value_head_dim=value
    )
    state = aligned_gated_deltanet(weights, fresh_gdn(heads, key, value, 12), config, identity_moments(12))
    assert all(tensor.isfinite().all() for tensor in state.values())


# --- Mamba2


def fresh_mamba2(heads, kv_heads, h, d):
    inner, shared = heads * h, kv_heads * h
    shapes = {
        "in_proj.weight": (2 * inner + 2 * shared + heads, d), "conv1d.weight": (inner + 2 * shared, 4),
        "conv1d.bias": (inner + 2 * shared,), "A_log": (heads,), "dt_bias": (heads,), "D": (heads,),
        "norm.weight": (heads, h), "out_proj.weight": (d, inner),
    }  # fmt: skip
    torch.manual_seed(4)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_published_mamba2_slices(name):
    heads, kv_heads, h, _ = BACKBONES[name]
    weights, fresh = random_weights(heads, kv_heads, h), fresh_mamba2(heads, kv_heads, h, 12)
    state = published_mamba2(weights, fresh)
    inner, shared = heads * h, kv_heads * h
    z, x, b, c, dt = state["in_proj.weight"].split([inner, shared, shared, inner, heads])
    assert torch.equal(x, weights.v)
    assert torch.equal(b, weights.k)
    assert torch.equal(c, weights.q)
    assert torch.equal(z, fresh["in_proj.weight"][:inner])
    assert torch.equal(dt, fresh["in_proj.weight"][-heads:])
    assert torch.equal(state["out_proj.weight"], weights.o)
    untouched = set(state) - {"in_proj.weight", "out_proj.weight"}
    assert all(torch.equal(state[key], fresh[key]) for key in untouched)


def test_aligned_mamba2_spreads_decays_within_the_heads_that_share_a_state():
    weights = random_weights(8, 4, 8)
    state = aligned_mamba2(weights, fresh_mamba2(8, 4, 8, 12), identity_moments(12))
    assert torch.equal(state["conv1d.weight"], torch.tensor([0, 0, 0, 1.0]).expand(128, 4).double())
    assert not state["conv1d.bias"].any()
    rates = (torch.nn.functional.softplus(state["dt_bias"]) * state["A_log"].exp()).view(4, 2)
    assert (rates[:, 0] / rates[:, 1] > 5).all()
    assert sorted(rates.flatten().tolist(), reverse=True)[0] == pytest.approx(1.0)
    assert torch.equal(state["in_proj.weight"][64:192], torch.cat([weights.v, weights.k, weights.q])[:128])
