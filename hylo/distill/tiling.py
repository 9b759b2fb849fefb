"""A layer's MLP over some tokens at a time, so that its wide activations never exist for a whole sequence."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hylo.distill.layers import decoder_layers


def tile_mlps(model: nn.Module, tokens: int) -> None:
    """Let the MLP of every layer see at most `tokens` tokens at a time, in forward and backward.

    Where a gradient is wanted, a tile keeps its input alone and is computed again in the backward. Parameters and
    their names stay. An MLP treats each token by itself, so the result is the same but for the order of sums.

    Args:
        model: laid out as `hylo.distill.layers` says, with an `mlp` in each layer.
        tokens: of all sequences of the forward pass together, > 0.
    """
    for layer in decoder_layers(model):
        mlp = layer.get_submodule("mlp")
        # Without a reference to the module: in a circle it would keep a stage's weights until the collector comes.
        mlp.forward = _tiled(partial(type(mlp).forward, weakref.proxy(mlp)), tokens)


def _tiled(mlp: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        rows = x.flatten(0, -2)  # tiles of rows are contiguous whatever B is
        if len(rows) <= tokens:
            return mlp(x)
        run = _recomputed(mlp) if torch.is_grad_enabled() else mlp
        return torch.cat([run(tile) for tile in rows.split(tokens)]).view(*x.shape[:-1], -1)

    return forward


def _recomputed(mlp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(tile: Tensor) -> Tensor:
        # There is no dropout in an MLP, and to keep the state of the generators would wait for the device.
        result: Tensor = checkpoint(mlp, tile, use_reentrant=False, preserve_rng_state=False)
        return result

    return run
