"""Multi-Head Latent Attention with key-value heads shared by groups of query heads (docs/mla_absorb.md)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from hylo.config import HyloConfig
from hylo.mixers.norm import RMSNorm
from hylo.mixers.packing import Input, add_product, pack_, product, project
from hylo.mixers.recurrent import widened
from hylo.mixers.rope import rotate
from hylo_ops import mla_absorb, mla_attention, mla_prefill
from hylo_ops.fused import mla_step


class LatentState:
    """The rows of one layer in a transformers cache, or nowhere (training).

    `preallocated` says that a row can be written where the cache has room for it, by the op that reads the others.
    """

    def __init__(self, cache: Cache | None, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx
        self.preallocated = isinstance(cache, StaticCache)

    def append(self, rows: Tensor) -> Tensor:
        """Rows [B, T, row] behind those that are there: [B, S, row], all of the cache."""
        if self._cache is None:
            return rows
        # zero width: the values are in the row as well
        keys, _ = self._cache.update(rows[:, None], rows[:, None, :, :0], self._layer_idx)
        return keys[:, 0]

    def open_row(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The cache [B, S, row], where the next row goes and how many there are with it, [B] int32; it then counts."""
        assert self._cache is not None
        layer: Any = self._cache.layers[self._layer_idx]
        position = layer.cumulative_length.to(torch.int32, copy=True).expand(batch)
        lengths = position + 1
        layer.cumulative_length.add_(1)
        return layer.keys[:, 0], position, lengths


class MultiHeadLatentAttention(nn.Module):
    """Caches one row [latent R | rotated key E | key scales] a token, shared by all heads.

    Many tokens: the rows are expanded to keys and values. With nothing before them and nothing masked, as in training,
    they go through `mla_attention`, else through transformers' attention interface. Many on a cache that holds their
    past: the cache is expanded slice by slice. One token on a cache: the up-projections are absorbed into query and
    output, and attention reads the rows as they are.

    With `qk_norm` the RMS of an expanded key depends on token and head. Its inverse, one scale for each key-value
    head, is stored in the row, and the norm's weight is folded into the up-projection and the rope key; so both
    forms read the same numbers.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; arXiv 2604.24715 for the shared heads.
    """

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.rank, self.nope, self.rope = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value = config.v_head_dim
        self.scaling = config.qk_head_dim**-0.5
        self.num_key_value_groups, self.is_causal = self.heads // self.kv_heads, True  # read by the attention interface
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, self.rank + self.rope, bias=False)
        self.kv_b_proj = nn.Linear(self.rank, self.kv_heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.qk_head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.qk_head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden_states: Input,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_starts: Tensor | None = None,
        absorb: bool = False,
        lengths: Sequence[int] | None = None,
        state: LatentState | None = None,
        residual: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Args:
            position_embeddings: cos and sin [B or 1, T, E] of the tokens.
            attention_mask: 4-D mask of the expanded form, None for plain causal.
            cache_starts: [B]. First cached token that is no padding (absorbed form).
            absorb: one token a sequence, on a cache that holds its past.
            lengths: of each sequence with the new tokens, where the cache is expanded slice by slice; no padding then.
            state: what the layer remembers, if not in `past_key_values`.
            residual: [B, T, D], which the result is added to in place.
        """
        if state is None:
            state = LatentState(past_key_values, self.layer_idx)
        q, row = self._projected(hidden_states)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        if absorb and state.preallocated:
            o = self._step_in_place(q_nope, q_rope, row, position_embeddings, state, cache_starts)
        else:
            q_rope, rows = rotate(q_rope, *position_embeddings), self._rotated(row, position_embeddings)
            rows = state.append(rows)
            if absorb:
                o = self._absorbed(q_nope, q_rope, rows, cache_starts)
            elif lengths is not None:
                o = self._sliced(q_nope, q_rope, rows, lengths)
            else:
                o = self._expanded(torch.cat([q_nope, q_rope], dim=-1), rows, attention_mask, **kwargs)
        return add_product(o.flatten(2), self.o_proj, residual)

    @property
    def row(self) -> int:
        """Width of a cached row."""
        return self.rank + self.rope + (0 if self.k_norm is None else self.kv_heads)

    def pack_(self) -> None:
        """Lets both down-projections be one product, where no gradient is wanted."""
        pack_([self.q_a_proj.weight, self.kv_a_proj_with_mqa.weight])

    def _projected(self, hidden_states: Input) -> tuple[Tensor, Tensor]:
        """Queries [B, T, H, nope + E], not rotated, and rows as `_with_scales` has them."""
        q_latent, row = project(hidden_states, (self.q_a_proj,), (self.kv_a_proj_with_mqa,))
        q = product(q_latent, self.q_b_proj).unflatten(-1, (self.heads, -1))
        if self.q_norm is not None:
            q = self.q_norm(q, dtype=q.dtype)
        return q, row if self.k_norm is None else self._with_scales(row, self.k_norm)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Keys [Hkv, nope, R], with the key norm's weight folded in, and values [Hkv, V, R]."""
        weight = self.kv_b_proj.weight.unflatten(0, (self.kv_heads, -1))
        w_uk, w_uv = weight.split([self.nope, self.value], dim=1)
        if self.k_norm is not None:
            w_uk = w_uk * self.k_norm.weight[: self.nope, None]
        return w_uk, w_uv

    def _with_scales(self, row: Tensor, k_norm: nn.RMSNorm) -> Tensor:
        """[B, T, R + E] -> [B, T, R + E + Hkv]: latent, unrotated key, key scales."""
        latent, rope = row.split([self.rank, self.rope], dim=-1)
        w_k = self.kv_b_proj.weight.unflatten(0, (self.kv_heads, -1))[:, : self.nope]
        k_nope = widened(torch.einsum("btr,gnr->btgn", latent, w_k.to(latent.dtype)))
        squares = k_nope.square().sum(-1) + widened(rope).square().sum(-1, keepdim=True)  # [B, T, Hkv]
        scales = torch.rsqrt(squares / (self.nope + self.rope) + self.config.rms_norm_eps)
        weighted = rope * k_norm.weight[self.nope :]
        return torch.cat([latent, weighted.to(row.dtype), scales.to(row.dtype)], dim=-1)

    def _rotated(self, row: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        latent, rope, scales = row.tensor_split([self.rank, self.rank + self.rope], dim=-1)
        return torch.cat([latent, rotate(rope[:, :, None], *position_embeddings)[:, :, 0], scales], dim=-1)

    def _expanded(self, q: Tensor, rows: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """q [B, T, H, nope + E], rows [B, S, row] -> [B, T, H, V]."""
        tokens, implementation = q.shape[1], self.config._attn_implementation
        # Without a mask, more rows than tokens are the room of an empty cache behind them.
        causal = implementation == "sdpa" and attention_mask is None and (tokens > 1 or rows.shape[1] == 1)
        k, v = self._keys_and_values(rows[:, :tokens] if causal else rows)
        if causal:
            return mla_attention(q, k, v, scale=self.scaling)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return o

    def _keys_and_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [B, S, row] -> [B, S, Hkv, nope + E], [B, S, Hkv, V]."""
        latent, rope, scales = rows.tensor_split([self.rank, self.rank + self.rope], dim=-1)
        w_uk, w_uv = self.up_projections()
        k_nope = torch.einsum("bsr,gnr->bsgn", latent, w_uk.to(latent.dtype))
        v = torch.einsum("bsr,gvr->bsgv", latent, w_uv.to(latent.dtype))
        k = torch.cat([k_nope, rope[:, :, None].expand(-1, -1, self.kv_heads, -1)], dim=-1)
        return (k if self.k_norm is None else k * scales[..., None]), v

    def _sliced(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """q [B, T, H, nope], [B, T, H, E], the last of `lengths` tokens of rows [B, S, row] -> [B, T, H, V]."""
        o = mla_prefill(
            q_nope,
            q_rope,
            rows,
            *self.up_projections(),
            lengths=lengths,
            scale=self.scaling,
            key_scale=self._scales_of(rows),
        )
        assert isinstance(o, Tensor)
        return o

    def _scales_of(self, rows: Tensor) -> Tensor | None:
        return rows[..., self.rank + self.rope :] if self.k_norm is not None else None

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, cache_starts: Tensor | None) -> Tensor:
        """q [B, 1, H, nope], [B, 1, H, E], rows [B, S, row] -> [B, 1, H, V]."""
        w_uk, w_uv = (w.to(q_nope.dtype).repeat_interleave(self.num_key_value_groups, 0) for w in self.up_projections())
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_uk)
        o_latent = mla_absorb(
            q_latent,
            q_rope,
            rows,
            cache_seqlens=torch.full((rows.shape[0],), rows.shape[1], dtype=torch.int32, device=rows.device),
            cache_starts=cache_starts,
            scale=self.scaling,
            key_scale=self._scales_of(rows),
        )
        return torch.einsum("bthr,hvr->bthv", o_latent, w_uv)

    def _step_in_place(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        row: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        state: LatentState,
        cache_starts: Tensor | None,
    ) -> Tensor:
        """The whole step in one op on a preallocated cache: rotate, append, attend, up-project."""
        kv_cache, position, lengths = state.open_row(len(row))
        w_uk, w_uv = (w.to(row.dtype) for w in self.up_projections())
        return mla_step(
            q_nope,
            q_rope,
            row,
            w_uk,
            w_uv,
            kv_cache,
            cache_seqlens=lengths,
            cache_starts=cache_starts,
            position=position,
            cos=position_embeddings[0],
            sin=position_embeddings[1],
            scale=self.scaling,
            key_scale=self.kv_heads if self.k_norm is not None else None,
        )
