"""Mamba2 mixer with grouped heads, as MambaInLlama cuts it out of attention (arXiv 2408.15237)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from hylo.config import HyloConfig
from hylo.mixers.packing import Input, add_product, product
from hylo.mixers.recurrent import (
    GatedRMSNorm,
    LayerState,
    ShortConv,
    reset_decay,
    reset_time_step,
    widened,
    without_padding,
)
from hylo_ops import fused

# A step of dt whose softplus is 0 in every dtype, as is its gradient: nothing decays, nothing is written.
_NO_STEP = -1e4


class Mamba2(nn.Module):
    """One head for each query head of the base; x and B come from its key-value heads and are shared by several.

    in_proj rows: [z Hq*h | x Hkv*h | B Hkv*h | C Hq*h | dt Hq], with h both head and state width.
    Source: arXiv 2604.24715; Mamba2 itself arXiv 2405.21060.
    """

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.inner, self.shared = self.heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner + 2 * self.shared + self.heads, bias=False)
        self.conv1d = ShortConv(self.inner + 2 * self.shared, config.linear_conv_kernel_dim, bias=True)
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm((self.heads, self.head_dim), config.linear_norm_eps, norm_before_gate=False)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def reset_parameters(self) -> None:
        self.conv1d.reset_parameters()
        reset_decay(self.A_log, 1.0)
        reset_time_step(self.dt_bias)
        init.ones_(self.D)

    def forward(
        self,
        hidden_states: Input,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        state: LayerState | None = None,
        residual: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; the arguments are `GatedDeltaNet`'s."""
        if state is None:
            state = LayerState(past_key_values, self.layer_idx, hidden_states.shape[1])
        projected = product(without_padding(hidden_states, attention_mask), self.in_proj)
        z, xbc, dt = projected.split([self.inner, self.inner + 2 * self.shared, self.heads], dim=-1)
        if attention_mask is not None:  # the convolution's bias makes padding non-zero again
            dt = dt.masked_fill(attention_mask[..., None] == 0, _NO_STEP)
        kv_heads = self.shared // self.head_dim
        y = state.mix(
            fused.mamba2_scan,
            fused.mamba2_step,
            z.unflatten(-1, (self.heads, self.head_dim)),
            xbc,
            dt,
            self.conv1d.weight,
            self.conv1d.bias,
            state.constant(lambda: -widened(self.A_log).exp()),
            self.norm.weight,
            d_state=self.head_dim,
            x_heads=kv_heads,
            b_heads=kv_heads,
            d=self.D,
            dt_bias=self.dt_bias,
            eps=self.norm.eps,
            norm_before_gate=self.norm.norm_before_gate,
        )
        return add_product(y.flatten(2), self.out_proj, residual)

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a sequence's convolution state [D, W] and recurrent state [H, V, K]."""
        return tuple(self.conv1d.weight.shape), (self.heads, self.head_dim, self.head_dim)
