"""Statistics of a base on text that it writes itself, and the fit of new mixers' output projections to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo.model import HyloForCausalLM

SAMPLE_TOKENS = 8192
SAMPLE_LENGTH = 256
_BATCH = 8  # sequences that go through the models together
_RIDGE = 1e-2  # of the mean squared feature


@dataclass(frozen=True)
class InputMoments:
    """Of the input x of one attention layer: mean [D], second moment E[x xT] [D, D]."""

    mean: Tensor
    second: Tensor


@torch.no_grad()
def sample_text(base: PreTrainedModel, *, tokens: int = SAMPLE_TOKENS, seed: int) -> Tensor:
    """Token ids [N, T] int64, about `tokens` in all, that the base draws from its own distribution.

    Sequences begin with the base's start token, or with random tokens if it has none, and do not end early: what
    follows an end token is the next document, as in packed training text.
    """
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_LENGTH, base.config.max_position_embeddings)
    count = max(1, tokens // length)
    start = base.config.bos_token_id
    first = torch.randint(base.config.vocab_size, (count, 1), generator=generator)
    ids = [first if start is None else torch.full_like(first, start)]
    cache = None
    for _ in range(length - 1):
        step = base(ids[-1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        ids.append(torch.multinomial(step.logits[:, -1].float().softmax(-1), 1, generator=generator))
    return torch.cat(ids, dim=1)


@torch.no_grad()
def input_moments(base: PreTrainedModel, ids: Tensor) -> list[InputMoments]:
    """Moments of every attention layer's input over the tokens ids [N, T]."""
    d = base.config.hidden_size
    layers = range(base.config.num_hidden_layers)
    means = [torch.zeros(d, dtype=base.dtype) for _ in layers]
    seconds = [torch.zeros(d, d, dtype=base.dtype) for _ in layers]

    def add(layer: int, x: Tensor, _mixed: Tensor) -> None:
        x = x.flatten(0, 1)
        means[layer] += x.sum(0) / ids.numel()
        seconds[layer] += x.T @ x / ids.numel()

    _visit_attention(base, ids, add)
    return [InputMoments(mean, second) for mean, second in zip(means, seconds, strict=True)]


@torch.no_grad()
def fit_outputs(hybrid: HyloForCausalLM, base: PreTrainedModel, ids: Tensor) -> list[float]:
    """Set every mixer's output projection to the ridge regression of the base's mixer output on the mixer's features.

    Each mixer sees the base's own inputs. The ridge pulls towards the projection that is there.

    Returns:
        for each layer the share of the base's mixer output (squared, over ids [N, T]) that is not reproduced.
    """
    mixers = [layer.mixer for layer in hybrid.model.layers]
    fits = [_Regression(_output_projection(mixer)) for mixer in mixers]
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    rotation = hybrid.model.rotary(positions, base.dtype)

    def add(layer: int, x: Tensor, mixed: Tensor) -> None:
        with fits[layer].listening() as features:
            mixers[layer](x, position_embeddings=rotation)
        fits[layer].add(features[0], mixed)

    _visit_attention(base, ids, add)
    return [fit.solve() for fit in fits]


class _Regression:
    """Least squares of targets [*, D] on the inputs [*, F] of one linear layer, from running sums."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.gram = linear.weight.new_zeros(linear.in_features, linear.in_features)
        self.cross = linear.weight.new_zeros(linear.in_features, linear.out_features)
        self.energy = 0.0

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Yield a list that receives the layer's input when it runs."""
        seen: list[Tensor] = []
        handle = self.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            yield seen
        finally:
            handle.remove()

    def add(self, features: Tensor, targets: Tensor) -> None:
        features, targets = features.flatten(0, -2), targets.flatten(0, -2)
        self.gram += features.T @ features
        self.cross += features.T @ targets
        self.energy += float(targets.square().sum())

    def solve(self) -> float:
        gram, cross, start = self.gram.double(), self.cross.double(), self.linear.weight.double()
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = start + torch.linalg.solve(gram + ridge, cross - gram @ start.T).T
        self.linear.weight.copy_(weight)
        missed = self.energy - 2 * (weight.T * cross).sum() + (weight @ gram * weight).sum()
        return float(missed) / max(self.energy, torch.finfo(torch.float64).tiny)


def _output_projection(mixer: nn.Module) -> nn.Linear:
    projection: Any = getattr(mixer, "o_proj", None) or mixer.get_submodule("out_proj")
    linear: nn.Linear = projection
    return linear


def _visit_attention(base: PreTrainedModel, ids: Tensor, visit: Callable[[int, Tensor, Tensor], None]) -> None:
    """Call visit(layer, input [B, T, D], output [B, T, D]) for every attention layer and batch of ids [N, T]."""
    layers = base.get_submodule("model.layers").children()

    def hook(layer: int) -> Callable[..., None]:
        return lambda _, __, kwargs, output: visit(layer, kwargs["hidden_states"], output[0])

    handles = [
        layer.get_submodule("self_attn").register_forward_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        for batch in ids.split(_BATCH):
            base(batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
