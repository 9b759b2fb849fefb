"""Held-out loss of a causal LM: nats per token, bits per byte, and loss by position in the window."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import cross_entropy

from hylo.errors import UserError
from hylo.evaluate.common import evaluating

_FIRST_BUCKET = 16  # tokens; the geometric buckets double from here
_HEAD_CHECK_TOKENS = 8


class PositionLoss(BaseModel):
    """Mean loss over the predictions made at window positions `start <= p < end` (p + 1 tokens of context)."""

    model_config = ConfigDict(frozen=True)

    start: int
    end: int
    loss: float  # nats per token
    tokens: int


class LossReport(BaseModel):
    """Held-out loss of one model on one token stream (see `held_out_loss` for what is counted)."""

    model_config = ConfigDict(frozen=True)

    loss: float  # nats per counted token
    tokens: int  # counted tokens
    window: int
    bits_per_byte: float | None  # None where the number of bytes is unknown
    by_position: list[PositionLoss]

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)


def position_edges(window: int, width: int | None = None) -> list[int]:
    """Bucket edges `0 = e0 < e1 < ... = window`: 0, 16, 32, 64, ... or, with `width`, 0, width, 2 width, ..."""
    if width is not None:
        return [*range(0, window, width), window]
    edges, edge = [0], _FIRST_BUCKET
    while edge < window:
        edges.append(edge)
        edge *= 2
    return [*edges, window]


def held_out_loss(
    model: Any,
    tokens: Sequence[int],
    *,
    window: int,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    text_bytes: int | None = None,
    bucket_width: int | None = None,
    slice_tokens: int = 1024,
) -> LossReport:
    """Mean negative log-likelihood of `tokens`, read in non-overlapping windows.

    With s = [bos] + tokens where `bos_token_id` is given and s = tokens otherwise, window i reads the inputs
    s[iW .. iW + W - 1] and predicts s[iW + 1 .. iW + W]. Windows share no input, and every token of s but s[0] is a
    target exactly once; the last window may be shorter. So with a bos every token of the text counts, without one all
    but the first. The target at window position p (0-based) has p + 1 tokens of context.

    Args:
        model: any Hugging Face causal LM; it is put in eval mode for the time of the call.
        tokens: token ids of the held-out text, at least one window of them.
        window: W, tokens.
        batch_size: windows of equal length run together. Changes the result by rounding only.
        bos_token_id: put before the stream once (not before each window).
        text_bytes: UTF-8 bytes of the text, for `bits_per_byte`. Without a bos the first token is charged
            ln(vocabulary) nats there, so that the number is the length of a code for the whole text.
        bucket_width: fixed position buckets of so many tokens; None doubles from 16.
        slice_tokens: positions whose logits exist at one time: peak memory is slice_tokens * vocabulary * 4 bytes.
    Raises:
        UserError: window, batch_size, bucket_width or slice_tokens below 1, or fewer tokens than one window.
        NotImplementedError: the model changes its logits after the head (soft-capping, scaling).
    Numerics: log-softmax in fp32 (fp64 for an fp64 model), sums in fp64; deterministic.
    """
    _check_positive(window=window, batch_size=batch_size, slice_tokens=slice_tokens, bucket_width=bucket_width)
    if len(tokens) < window:
        raise UserError(f"the text has {len(tokens)} tokens, fewer than one window of {window}")
    prefix = [] if bos_token_id is None else [bos_token_id]
    stream = torch.tensor([*prefix, *tokens], dtype=torch.long, device=model.device)
    sums = torch.zeros(window, dtype=torch.float64, device=model.device)
    counts = torch.zeros_like(sums)
    with evaluating(model):
        _check_head(model, stream[None, :_HEAD_CHECK_TOKENS])
        for inputs, targets in _batches(stream, window, batch_size):
            nll = _token_losses(model, inputs, targets, slice_tokens)
            sums[: nll.shape[1]] += nll.sum(0)
            counts[: nll.shape[1]] += nll.shape[0]
    total, counted = sums.sum().item(), int(counts.sum().item())
    first_token = math.log(model.config.vocab_size) if bos_token_id is None else 0.0
    return LossReport(
        loss=total / counted,
        tokens=counted,
        window=window,
        bits_per_byte=None if text_bytes is None else (total + first_token) / math.log(2) / text_bytes,
        by_position=_by_position(sums.cpu(), counts.cpu(), position_edges(window, bucket_width)),
    )


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def _batches(stream: torch.Tensor, window: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) [B, W] over whole windows, then one [1, rest] for the shorter last window."""
    predicted = stream.numel() - 1
    whole = predicted // window * window
    inputs, targets = stream[:whole].view(-1, window), stream[1 : whole + 1].view(-1, window)
    yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
    if whole < predicted:
        yield stream[None, whole:predicted], stream[None, whole + 1 :]


def _token_losses(model: Any, inputs: torch.Tensor, targets: torch.Tensor, slice_tokens: int) -> torch.Tensor:
    """[B, T] fp64 negative log-likelihoods; logits exist for `slice_tokens` positions at a time."""
    hidden = model.get_decoder()(input_ids=inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    slices = zip(hidden.flatten(0, 1).split(slice_tokens), targets.flatten().split(slice_tokens), strict=True)
    losses = []
    for part, target in slices:
        logits = head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(cross_entropy(logits, target, reduction="none").double())
    return torch.cat(losses).view_as(targets)


def _check_head(model: Any, ids: torch.Tensor) -> None:
    """The sliced head must be the model's whole way from hidden states to logits."""
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    difference = (model.get_output_embeddings()(hidden).float() - logits.float()).abs().max()
    if difference > 1e-3 * logits.float().abs().max():
        raise NotImplementedError(
            f"{type(model).__name__} changes its logits after the output embedding; its loss cannot be taken in slices"
        )


def _by_position(sums: torch.Tensor, counts: torch.Tensor, edges: list[int]) -> list[PositionLoss]:
    buckets = []
    for start, end in pairwise(edges):
        n = int(counts[start:end].sum().item())
        if n:
            mean = sums[start:end].sum().item() / n
            buckets.append(PositionLoss(start=start, end=end, loss=mean, tokens=n))
    return buckets
