"""Held-out loss against its definition, in batches and slices; what it refuses."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM

from hylo.errors import UserError
from hylo.evaluate import encode_text, held_out_loss
from hylo.evaluate.perplexity import position_edges
from tests import tiny


def direct_losses(model, stream: list[int], window: int) -> list[list[float]]:
    """Per window the losses from whole logits, one window at a time: the definition spelled out."""
    rows = []
    for start in range(0, len(stream) - 1, window):
        part = torch.tensor(stream[start : start + window + 1])
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0]
        rows.append(cross_entropy(logits, part[1:], reduction="none").tolist())
    return rows


@pytest.mark.parametrize("bos", [None, 0], ids=["no-bos", "bos"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_loss_counts_every_token_once(name, bos):
    model = tiny.MODELS[name]()
    tokens = encode_text(tiny.tokenizer(), tiny.text())[:331]
    rows = direct_losses(model, tokens if bos is None else [bos, *tokens], 48)
    flat = [value for row in rows for value in row]
    report = held_out_loss(model, tokens, window=48, batch_size=3, bos_token_id=bos, slice_tokens=17)
    assert report.tokens == len(flat) == len(tokens) - (bos is None)
    assert report.loss == pytest.approx(sum(flat) / len(flat), rel=1e-6)
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    assert sum(bucket.tokens for bucket in report.by_position) == report.tokens
    for bucket in report.by_position:
        inside = [value for row in rows for value in row[bucket.start : bucket.end]]
        assert bucket.tokens == len(inside)
        assert bucket.loss == pytest.approx(sum(inside) / len(inside), rel=1e-6)


def test_loss_does_not_depend_on_batch_or_slice():
    model, tokens = tiny.llama(), encode_text(tiny.tokenizer(), tiny.text())[:500]
    whole = held_out_loss(model, tokens, window=64, batch_size=1, slice_tokens=10_000)
    parts = held_out_loss(model, tokens, window=64, batch_size=4, slice_tokens=5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert held_out_loss(model, tokens, window=64, batch_size=4, slice_tokens=5) == parts


def test_logits_are_never_whole():
    model, tokens = tiny.llama(), encode_text(tiny.tokenizer(), tiny.text())[:200]
    rows = []
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    held_out_loss(model, tokens, window=64, batch_size=2, slice_tokens=20)
    assert max(rows) == 20


def test_bits_per_byte_is_a_code_length():
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform predictions: every token costs log2(vocabulary) bits
    part = tiny.text()[:900]
    tokens = encode_text(tiny.tokenizer(), part)
    expected = len(tokens) * math.log2(tiny.VOCAB) / len(part.encode())
    for bos in (None, 0):
        report = held_out_loss(model, tokens, window=32, bos_token_id=bos, text_bytes=len(part.encode()))
        assert report.loss == pytest.approx(math.log(tiny.VOCAB), rel=1e-6)
        assert report.bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_position_edges():
    assert position_edges(100) == [0, 16, 32, 64, 100]
    assert position_edges(128) == [0, 16, 32, 64, 128]
    assert position_edges(8) == [0, 8]
    assert position_edges(100, width=40) == [0, 40, 80, 100]
    assert position_edges(80, width=40) == [0, 40, 80]


def test_loss_keeps_the_mode_and_makes_no_gradients():
    model = tiny.llama().train()
    held_out_loss(model, list(range(40)), window=16)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 41}, "40 tokens, fewer than one window of 41"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 8, "batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"window": 8, "bucket_width": 0}, "bucket_width must be at least 1, got 0"),
    ],
)
def test_loss_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        held_out_loss(tiny.llama(), list(range(40)), **arguments)


def test_loss_refuses_a_model_that_changes_its_logits():
    torch.manual_seed(0)
    dimensions = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**dimensions, **heads, final_logit_softcapping=0.01, pad_token_id=0))
    with pytest.raises(NotImplementedError, match="Gemma2ForCausalLM changes its logits"):
        held_out_loss(model, list(range(40)), window=16)
