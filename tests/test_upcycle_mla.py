"""Upcycling to MLA: every copied slice, the exact limits, ranks and matched frequencies."""

import pytest
import torch

from hylo.upcycle import build_hybrid
from hylo.upcycle.base import attention_weights
from hylo.upcycle.to_mla import aligned_mla, factor, matched_pairs, published_mla
from tests.upcycle_models import FAMILIES, make_base, make_config


def in_float64(base):
    """The base with per-head norms that do not round to float32, as transformers' Qwen3 does in any dtype."""
    for layer in base.model.layers:
        for name, norm in list(layer.self_attn.named_children()):
            if name.endswith("norm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                exact.weight = norm.weight
                setattr(layer.self_attn, name, exact)
    return base


def mixer_error(base, hybrid, layer, x, base_rotation, rotation):
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    expected = base.model.layers[layer].self_attn(x, position_embeddings=base_rotation, attention_mask=mask)[0]
    got = hybrid.model.layers[layer].mixer(x, position_embeddings=rotation, attention_mask=mask)
    return (got - expected).abs().max().item()


@pytest.mark.parametrize("init", ["published", "aligned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mla_without_rotation_and_at_full_rank_is_the_base_attention(family, init):
    base = in_float64(make_base(family, rms_norm_eps=1e-20))
    config = make_config(base, qk_rope_head_dim=0, qk_nope_head_dim=8, q_lora_rank=32, kv_lora_rank=32)
    weights, moment = attention_weights(base, 1), torch.eye(32, dtype=torch.float64)
    state, _ = published_mla(weights, config) if init == "published" else aligned_mla(weights, config, moment)
    hybrid, _ = build_hybrid(base, config)
    hybrid.model.layers[1].mixer.load_state_dict(state)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    unrotated = torch.ones(1, 17, 8).double(), torch.zeros(1, 17, 8).double()
    empty = torch.empty(1, 17, 0).double(), torch.empty(1, 17, 0).double()
    assert mixer_error(base, hybrid, 1, x, unrotated, empty) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_published_mla_slices(family):
    base = make_base(family)
    weights = attention_weights(base, 0)
    config = make_config(base, qk_nope_head_dim=4, qk_rope_head_dim=4, q_lora_rank=20, kv_lora_rank=12)
    state, energy = published_mla(weights, config)
    _, s, _ = torch.linalg.svd(weights.q)
    q_down = state["q_a_proj.weight"]
    torch.testing.assert_close(q_down @ q_down.T, s[:20].square().diag())  # all singular weight is in the down factor
    u, s, vh = torch.linalg.svd(weights.q, full_matrices=False)
    best = ((u[:, :20] * s[:20]) @ vh[:20]).view(4, 8, 32)
    torch.testing.assert_close(state["q_b_proj.weight"] @ q_down, torch.cat([best[:, :4], best[:, 4:]], 1).view(32, 32))
    u, s, vh = torch.linalg.svd(torch.cat([weights.k, weights.v]), full_matrices=False)
    best_k, best_v = ((u[:, :12] * s[:12]) @ vh[:12]).view(2, 2, 8, 32)
    latent, rope = state["kv_a_proj_with_mqa.weight"].split([12, 4])
    up = (state["kv_b_proj.weight"] @ latent).view(2, 12, 32)
    torch.testing.assert_close(up[:, :4], best_k[:, :4])
    torch.testing.assert_close(up[:, 4:], best_v)
    torch.testing.assert_close(rope, (weights.k[4:8] + weights.k[12:16]) / 2)
    assert torch.equal(state["o_proj.weight"], weights.o)
    assert energy.key_value == pytest.approx(float(s[:12].square().sum() / s.square().sum()))
    if family == "qwen3":
        assert torch.equal(state["q_norm.weight"], weights.q_norm)
        assert torch.equal(state["k_norm.weight"], weights.k_norm)


def test_published_mla_keeps_first_and_last_rows_of_a_narrower_head():
    base = make_base("qwen3")
    weights = attention_weights(base, 0)
    config = make_config(base, qk_nope_head_dim=3, qk_rope_head_dim=2, q_lora_rank=32)
    state, _ = published_mla(weights, config)
    kept = [0, 1, 2, 6, 7]
    queries = (state["q_b_proj.weight"] @ state["q_a_proj.weight"]).view(4, 5, 32)
    torch.testing.assert_close(queries, weights.per_head(weights.q)[:, kept])
    assert torch.equal(state["k_norm.weight"], weights.k_norm[kept])


def test_reconstruction_error_falls_with_rank_and_energy_says_by_how_much():
    torch.manual_seed(1)
    matrix = torch.randn(40, 24, dtype=torch.float64)
    x = torch.randn(500, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    moment = x.T @ x / len(x)
    for metric, inputs in ((None, torch.eye(24).double()), (moment, x / len(x) ** 0.5)):
        errors = []
        for rank in (1, 4, 8, 16, 24):
            up, down, energy = factor(matrix, rank, metric)
            error = ((matrix - up @ down) @ inputs.T).square().sum() / (matrix @ inputs.T).square().sum()
            assert float(error) == pytest.approx(1 - energy, abs=1e-9)
            errors.append(float(error))
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > errors[1] > 0.01
        assert errors[-1] < 1e-12


def test_a_rank_beyond_the_matrix_is_zeros():
    matrix = torch.randn(6, 24, dtype=torch.float64)
    up, down, energy = factor(matrix, 10)
    assert up.shape == (6, 10)
    assert down.shape == (10, 24)
    assert energy == pytest.approx(1)
    torch.testing.assert_close(up @ down, matrix)


@pytest.mark.parametrize(("h", "e"), [(64, 32), (128, 64), (8, 4), (64, 64), (64, 24), (96, 80), (8, 0)])
def test_matched_pairs_have_the_nearest_frequency(h, e):
    pairs = matched_pairs(h, e)
    assert len(set(pairs)) == e // 2
    for j, pair in enumerate(pairs):
        assert abs(pair / h - j / e) <= 0.5 / h + 1e-12  # exponents of theta, in steps of 1 / h
    if e == h // 2:
        assert pairs == list(range(0, h // 2, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_aligned_mla_is_exact_where_keys_of_a_frequency_are_turned_copies(family):
    """Rotated keys of all KV heads are complex multiples of one key, the unmatched pairs are 0: nothing is lost."""
    base = make_base(family, rms_norm_eps=1e-20)
    attention = base.model.layers[0].self_attn
    with torch.no_grad():
        keys = attention.k_proj.weight.view(2, 2, 4, 32)  # heads, halves, pairs
        keys[:, :, 1::2] = 0
        size = 1.0 if family == "qwen3" else 1.7
        turn = torch.polar(torch.full((2,), size).double(), torch.tensor([0.6, -2.0]).double())
        shared = torch.complex(keys[0, 0, ::2], keys[0, 1, ::2]) * turn[:, None]
        keys[1, 0, ::2], keys[1, 1, ::2] = shared.real, shared.imag
        if family == "qwen3":  # a turn commutes with the norm where the two weights of a pair are equal
            for norm in (attention.q_norm, attention.k_norm):
                norm.weight[4:] = norm.weight[:4]
    config = make_config(base, qk_rope_head_dim=4, q_lora_rank=32, kv_lora_rank=32)
    hybrid, _ = build_hybrid(base, config)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    state, _ = aligned_mla(attention_weights(base, 0), config, x.flatten(0, 1).T @ x.flatten(0, 1) / 34)
    hybrid.model.layers[0].mixer.load_state_dict(state)
    positions = torch.arange(17)[None]
    base_rotation = base.model.rotary_emb(x, positions)
    rotation = hybrid.model.rotary(positions, torch.float64)
    assert mixer_error(base, hybrid, 0, x, base_rotation, rotation) < 1e-6  # the angles are float32 on both sides
    published, _ = published_mla(attention_weights(base, 0), config)
    hybrid.model.layers[0].mixer.load_state_dict(published)
    assert mixer_error(base, hybrid, 0, x, base_rotation, rotation) > 0.1


def test_aligned_mla_of_a_narrower_head_keeps_the_base_scale():
    """Dropping rows in which all keys are 0 changes nothing but the softmax scale, which MLA reads off its width."""
    base = make_base()
    with torch.no_grad():
        keys = base.model.layers[0].self_attn.k_proj.weight.view(2, 2, 4, 32)
        keys[:, :, :2] = 0  # the fast pairs; the slow ones stay
    config = make_config(base, qk_rope_head_dim=0, qk_nope_head_dim=4, q_lora_rank=32, kv_lora_rank=32)
    hybrid, _ = build_hybrid(base, config)
    state, _ = aligned_mla(attention_weights(base, 0), config, torch.eye(32).double())
    hybrid.model.layers[0].mixer.load_state_dict(state)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    unrotated = torch.ones(1, 9, 8).double(), torch.zeros(1, 9, 8).double()
    assert mixer_error(base, hybrid, 0, x, unrotated, (torch.empty(1, 9, 0),) * 2) < 1e-10
