"""The aligned start: moments, sampled text, the fit, and what it improves on random and on trained weights."""

import pytest
import torch

from hylo.errors import UserError
from hylo.upcycle import build_hybrid, hybrid_config
from hylo.upcycle.calibrate import fit_outputs, input_moments, sample_text
from tests import stories260k
from tests.upcycle_models import FAMILIES, make_base, make_config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_aligned_mixers_reproduce_more_of_the_base(family, mixer):
    base = make_base(family)
    ids = torch.randint(0, 61, (16, 48), generator=torch.Generator().manual_seed(0))
    unseen = torch.randint(0, 61, (8, 48), generator=torch.Generator().manual_seed(1))
    config = make_config(base, [1], mixer, kv_lora_rank=16)
    published, _ = build_hybrid(base, config)
    aligned, report = build_hybrid(base, config, init="aligned", calibration=ids)
    assert list(report.unfitted) == [0, 1, 2]
    assert all(0 < share < 1 for share in report.unfitted.values())
    before, after = (missed(hybrid, base, unseen) for hybrid in (published, aligned))
    assert all(new < old for new, old in zip(after, before, strict=True))


@torch.no_grad()
def missed(hybrid, base, ids):
    """Share of each attention output (squared) that the hybrid's mixer on the same input misses."""
    shares = []
    states = base(ids, output_hidden_states=True).hidden_states
    rotation = hybrid.model.rotary(torch.arange(ids.shape[1])[None], base.dtype)
    for i, layer in enumerate(base.model.layers):
        x = layer.input_layernorm(states[i])
        positions = base.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
        expected = layer.self_attn(x, position_embeddings=positions, attention_mask=None)[0]
        got = hybrid.model.layers[i].mixer(x, position_embeddings=rotation)
        shares.append(float((got - expected).square().sum() / expected.square().sum()))
    return shares


def test_fit_is_the_least_squares_solution_and_reports_what_is_left():
    base = make_base()
    hybrid, _ = build_hybrid(base, make_config(base, [], "mamba2"))
    ids = torch.randint(0, 61, (12, 60), generator=torch.Generator().manual_seed(0))
    left = fit_outputs(hybrid, base, ids)
    again = missed(hybrid, base, ids)
    assert left == pytest.approx(again, rel=1e-6)
    torch.manual_seed(0)
    weight = hybrid.model.layers[1].mixer.out_proj.weight
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)
    assert missed(hybrid, base, ids)[1] > left[1]


def test_moments_are_those_of_the_attention_inputs():
    base = make_base()
    ids = torch.randint(0, 61, (11, 20), generator=torch.Generator().manual_seed(0))  # not a multiple of the batch
    with torch.no_grad():
        x = base.model.layers[1].input_layernorm(base(ids, output_hidden_states=True).hidden_states[1]).flatten(0, 1)
    moments = input_moments(base, ids)
    assert len(moments) == 3
    torch.testing.assert_close(moments[1].mean, x.mean(0))
    torch.testing.assert_close(moments[1].second, x.T @ x / len(x))


def test_sampled_text_is_the_base_s_own_and_depends_on_the_seed_alone():
    base = make_base()
    ids = sample_text(base, tokens=640, seed=5)
    assert ids.shape == (10, 64)  # no longer than the position table
    assert (ids[:, 0] == 0).all()
    assert torch.equal(ids, sample_text(base, tokens=640, seed=5))
    assert not torch.equal(ids, sample_text(base, tokens=640, seed=6))
    own = base(ids, labels=ids).loss
    other = base(ids.flip(1), labels=ids.flip(1)).loss
    assert own < other - 0.3
    base.config.bos_token_id = None
    assert len(set(sample_text(base, tokens=640, seed=5)[:, 0].tolist())) > 3


def test_aligned_refuses_another_theta():
    base = make_base()
    config = make_config(base, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(UserError, match=r"keeps the base's rope theta 10000\.0, got 500000\.0"):
        build_hybrid(base, config, init="aligned")


# --- A trained checkpoint


def test_the_trained_checkpoint_is_read_right():
    stories260k.require_data()
    model = stories260k.load_model()
    prompt = torch.tensor([stories260k.PROMPT_IDS])
    ids = model.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert ids[0, 5:].tolist() == stories260k.GREEDY_IDS
    logits = torch.tensor([-10.1366, -5.3295, -10.1381, -10.1369, -10.1372, -10.1383])
    torch.testing.assert_close(model(prompt).logits[0, -1, :6], logits, atol=1e-3, rtol=0)
    tokenizer = stories260k.load_tokenizer()
    assert tokenizer("Once upon a time").input_ids == stories260k.PROMPT_IDS
    story = stories260k.stories()[1]
    assert tokenizer.decode(tokenizer(story).input_ids, skip_special_tokens=True) == story


@pytest.fixture(scope="module")
def trained():
    """The trained base, held-out stories [16, 128], and text that the base wrote."""
    stories260k.require_data()
    base = stories260k.load_model()
    ids = stories260k.encode(stories260k.stories()[:60], 128, 16)
    return base, ids, sample_text(base, seed=42)


@pytest.mark.parametrize(
    ("mixer", "mla_layers", "bounds"),
    [
        # start loss of the published initialisation at least, of the aligned one at most; the teacher's is 1.23
        ("gated_deltanet", [], (4.5, 2.7)),
        ("gated_deltanet", [2], (4.3, 2.7)),
        ("mamba2", [], (6.0, 3.1)),
        ("mamba2", [2], (6.0, 3.1)),
        ("gated_deltanet", [0, 1, 2, 3, 4], (4.3, 3.1)),
    ],
    ids=["gdn", "mla+4gdn", "mamba2", "mla+4mamba2", "mla"],
)
def test_start_loss_on_a_trained_checkpoint(trained, mixer, mla_layers, bounds, capsys):
    base, ids, calibration = trained
    config = hybrid_config(base.config, mixer=mixer, mla_layers=mla_layers, kv_lora_rank=28)
    losses = {}
    for init in ("published", "aligned"):
        hybrid, _ = build_hybrid(base, config, init=init, calibration=calibration)
        with torch.no_grad():
            losses[init] = hybrid(ids, labels=ids, use_cache=False).loss.item()
    with capsys.disabled():
        print(f"\n{mixer} {mla_layers}: " + ", ".join(f"{init} {loss:.3f}" for init, loss in losses.items()), end=" ")
    assert losses["published"] > bounds[0]
    assert losses["aligned"] < bounds[1]
