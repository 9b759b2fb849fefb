"""Gated DeltaNet mixer (arXiv 2412.06464), with the parameter names of flash-linear-attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from hylo.config import HyloConfig
from hylo.mixers.packing import Input, add_product, pack_, stacked
from hylo.mixers.recurrent import (
    GatedRMSNorm,
    LayerState,
    ShortConv,
    reset_decay,
    reset_time_step,
    widened,
    without_padding,
)
from hylo_ops import chunk_gated_delta_rule, fused, l2_norm


class GatedDeltaNet(nn.Module):
    """H heads with a state of [K, V] each; q and k are L2-normalised, the output is normed and gated.

    Source: arXiv 2604.24715, and flash-linear-attention's defaults for what it leaves open.
    """

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        d, heads, width = config.hidden_size, config.linear_num_heads, config.linear_conv_kernel_dim
        keys, values = heads * config.linear_key_head_dim, heads * config.linear_value_head_dim
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.a_proj = nn.Linear(d, heads, bias=False)
        self.b_proj = nn.Linear(d, heads, bias=False)
        self.q_conv1d = ShortConv(keys, width, bias=False)
        self.k_conv1d = ShortConv(keys, width, bias=False)
        self.v_conv1d = ShortConv(values, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.o_norm = GatedRMSNorm((config.linear_value_head_dim,), config.linear_norm_eps, norm_before_gate=True)
        self.o_proj = nn.Linear(values, d, bias=False)

    def reset_parameters(self) -> None:
        for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d):
            conv.reset_parameters()
        reset_decay(self.A_log, 0.0)
        reset_time_step(self.dt_bias)

    def forward(
        self,
        hidden_states: Input,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        state: LayerState | None = None,
        residual: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Args:
            attention_mask: [B, T], 0 at padding.
            state: what the layer remembers, if not in `past_key_values`.
            residual: [B, T, D], which the result is added to in place.
        """
        x = without_padding(hidden_states, attention_mask)
        if state is None:
            state = LayerState(past_key_values, self.layer_idx, x.shape[1])
        qkv, gate, a, b = state.project_and_convolve(x, stacked(self._conv_weights()), *self._projections())
        q, k, v = self._heads(qkv)
        if state.decoding:
            o = state.step(fused.gated_delta_rule_step, q, k, v, a, b, self.A_log, self.dt_bias)
        else:
            g = -widened(self.A_log).exp() * F.softplus(widened(a) + widened(self.dt_bias))
            o = state.scan(chunk_gated_delta_rule, l2_norm(q), l2_norm(k), v, g, widened(b).sigmoid())
        return add_product(self.o_norm(o, gate), self.o_proj, residual)

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a sequence's convolution state [D, W] and recurrent state [H, K, V]."""
        rows, heads = [len(weight) for weight in self._conv_weights()], len(self.A_log)
        return (sum(rows), self.q_conv1d.weight.shape[1]), (heads, rows[0] // heads, rows[2] // heads)

    def pack_(self) -> None:
        """Lets all projections of the input be one product, where no gradient is wanted."""
        pack_([layer.weight for group in self._projections() for layer in group])
        pack_(self._conv_weights())

    def _projections(self) -> tuple[tuple[nn.Linear, ...], ...]:
        return (self.q_proj, self.k_proj, self.v_proj), (self.g_proj,), (self.a_proj,), (self.b_proj,)

    def _conv_weights(self) -> list[nn.Parameter]:
        """The three convolutions run as one over all channels."""
        return [self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight]

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B, T, H, K] and v [B, T, H, V]."""
        sizes = [self.q_proj.out_features, self.k_proj.out_features, self.v_proj.out_features]
        q, k, v = (t.unflatten(-1, (len(self.A_log), -1)) for t in qkv.split(sizes, dim=-1))
        return q, k, v
