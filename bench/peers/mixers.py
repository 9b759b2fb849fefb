"""Whole token mixers over other libraries' kernels, for training.

Parameters are ours, what lies between the projections is theirs, and each projection is a layer of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import Missing, imported
from hylo.mixers import GatedDeltaNet, Mamba2, MultiHeadLatentAttention
from hylo.mixers.rope import rotate


class FlaGatedDeltaNet(nn.Module):
    """With fla's kernels, called as its own layer calls them in training.

    One convolution for q, k and v together; unit vectors, decay and write strength made within the rule; norm and gate
    in one.
    """

    def __init__(self, mixer: GatedDeltaNet) -> None:
        super().__init__()
        self.mixer = mixer
        self.convolve = imported("fla.modules.causal_conv1d", "causal_conv1d")
        self.rule = imported("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
        self.norm = imported("fla.modules.fused_norm_gate", "rms_norm_gated")

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; no padding and no cache."""
        m, heads = self.mixer, len(self.mixer.A_log)
        sides = m.q_proj, m.k_proj, m.v_proj
        qkv = torch.cat([side(hidden_states) for side in sides], dim=-1)
        gate, a, b = m.g_proj(hidden_states), m.a_proj(hidden_states), m.b_proj(hidden_states)
        weight = torch.cat([m.q_conv1d.weight, m.k_conv1d.weight, m.v_conv1d.weight])
        qkv, _ = self.convolve(qkv, weight, None, activation="silu", backend="triton")
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in qkv.split([side.out_features for side in sides], dim=-1))
        o, _ = self.rule(
            *(q, k, v, a, b),
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=m.A_log,
            dt_bias=m.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )
        y = self.norm(o, gate.unflatten(-1, o.shape[2:]), m.o_norm.weight, None, eps=m.o_norm.eps)
        return m.o_proj(y.flatten(2))


class MambaSsmMamba2(nn.Module):
    """With mamba-ssm's kernels and causal-conv1d's, one after the other. Chunks of 256 tokens, as published.

    x and B have fewer heads than its fused block knows, so they are repeated between convolution and scan.
    """

    def __init__(self, mixer: Mamba2) -> None:
        super().__init__()
        self.mixer = mixer
        self.convolve = imported("causal_conv1d", "causal_conv1d_fn")
        self.scan = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
        self.norm = imported("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; no padding and no cache."""
        m = self.mixer
        z, xbc, dt = m.in_proj(hidden_states).split([m.inner, m.inner + 2 * m.shared, m.heads], dim=-1)
        xbc = self.convolve(xbc.mT, m.conv1d.weight, m.conv1d.bias, activation="silu").mT
        x, b, c = (t.unflatten(-1, (-1, m.head_dim)) for t in xbc.split([m.shared, m.shared, m.inner], dim=-1))
        x, b = (t.repeat_interleave(m.heads // t.shape[2], dim=2) for t in (x, b))
        decay = -m.A_log.float().exp()
        o = self.scan(*(x, dt, decay, b, c, 256), D=m.D, dt_bias=m.dt_bias, dt_softplus=True)
        y = self.norm(
            o.flatten(2),
            m.norm.weight.flatten(),
            None,
            z=z,
            eps=m.norm.eps,
            group_size=m.head_dim,
            norm_before_gate=m.norm.norm_before_gate,
        )
        return m.out_proj(y)


class SdpaMla(nn.Module):
    """MLA with PyTorch's attention as PyTorch chooses it; without norms of queries and keys."""

    def __init__(self, mixer: MultiHeadLatentAttention) -> None:
        super().__init__()
        if mixer.q_norm is not None:
            raise Missing("norms of queries and keys")
        self.mixer = mixer

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; no padding and no cache."""
        m = self.mixer
        q = m.q_b_proj(m.q_a_proj(hidden_states)).unflatten(-1, (m.heads, -1))
        latent, k_rope = m.kv_a_proj_with_mqa(hidden_states).split([m.rank, m.rope], dim=-1)
        k_nope, v = m.kv_b_proj(latent).unflatten(-1, (m.kv_heads, -1)).split([m.nope, m.value], dim=-1)
        q_nope, q_rope = q.split([m.nope, m.rope], dim=-1)
        k_rope = rotate(k_rope[:, :, None], *position_embeddings).expand(-1, -1, m.kv_heads, -1)
        q = torch.cat([q_nope, rotate(q_rope, *position_embeddings)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=m.scaling, enable_gqa=m.heads != m.kv_heads
        )  # fmt: skip
        return m.o_proj(o.transpose(1, 2).flatten(2))


# The mixer that each library has kernels for, by our name of it.
MIXERS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "fla": ("gated_deltanet", FlaGatedDeltaNet),
    "mamba_ssm": ("mamba2", MambaSsmMamba2),
}
