"""The hybrid language model: one code path for training, prefill and decode, on transformers' own caches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hylo.config import HyloConfig
from hylo.mixers import GatedDeltaNet, Mamba2, make_mixer
from hylo.mixers.norm import RMSNorm
from hylo.mixers.packing import Input, Normed, add_product, gated_at_once, pack_, product, project, project_at_once
from hylo.mixers.rope import Rotary
from hylo_ops import swiglu


class Mlp(nn.Module):
    """SwiGLU, as the base has it."""

    def __init__(self, config: HyloConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self._silu = config.hidden_act == "silu"

    def forward(self, x: Input, residual: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D], added in place to `residual` if given."""
        wide = self._gated_at_once(x)
        if wide is None:
            gate, up = project(x, (self.gate_proj,), (self.up_proj,))
            wide = self.activation(gate) * up
        return add_product(wide, self.down_proj, residual)

    def _gated_at_once(self, x: Input) -> Tensor | None:
        """Both halves of one product, and one op of them; None where that is not for this activation or weights."""
        if not self._silu:
            return None
        if (wide := gated_at_once(x, self.gate_proj, self.up_proj)) is not None:
            return wide
        found = project_at_once(x, (self.gate_proj, self.up_proj))
        return None if found is None else swiglu(found[0])

    def pack_(self) -> None:
        """Lets both products with the input be one, where no gradient is wanted."""
        pack_([self.gate_proj.weight, self.up_proj.weight])


class HyloDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual block: mixer, then MLP."""

    def __init__(self, config: HyloConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = make_mixer(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, hidden_states: Tensor, in_place: bool = False, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]; `in_place` adds to the given tensor, for whoever wants neither it nor a gradient."""
        if in_place:
            self.mixer(Normed(hidden_states, self.input_layernorm), residual=hidden_states, **kwargs)
            return self.mlp(Normed(hidden_states, self.post_attention_layernorm), residual=hidden_states)
        normed, hidden_states = self.input_layernorm(hidden_states, stream=True)
        normed, hidden_states = self.post_attention_layernorm(self.mixer(normed, **kwargs), hidden_states)
        return hidden_states + self.mlp(normed)


class HyloPreTrainedModel(PreTrainedModel):
    config: HyloConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyloDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_stateful = True  # a recurrent state cannot be rolled back, so no assisted generation
    _can_record_outputs = {"hidden_states": HyloDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedDeltaNet | Mamba2):
            module.reset_parameters()


class HyloModel(HyloPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HyloDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D] of tokens [B, T]; arguments as in every transformers decoder."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = self._seen_tokens(past_key_values)
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen)[None]
        per_mixer = self._layer_arguments(hidden_states, attention_mask, position_ids, past_key_values)
        assert self.config.layer_types is not None
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(hidden_states, past_key_values=past_key_values, **per_mixer[layer_type], **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _seen_tokens(self, cache: Cache | None) -> int | Tensor:
        """A recurrent layer does not count tokens, and needs no positions either."""
        return cache.get_seq_length() if cache is not None and self.config.mla_layers else 0

    def _layer_arguments(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> dict[str, dict[str, Any]]:
        """What the mixers of each layer type get beside the hidden states; made once for all layers."""
        prepared = attention_mask if isinstance(attention_mask, dict) else None  # generate() makes them for StaticCache
        shared: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": hidden_states,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        padding = prepared.get("linear_attention") if prepared else create_recurrent_attention_mask(**shared)
        arguments: dict[str, dict[str, Any]] = {"linear_attention": {"attention_mask": padding}}
        if not self.config.mla_layers:
            return arguments
        mla: dict[str, Any] = {"position_embeddings": self.rotary(position_ids, hidden_states.dtype)}
        full = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
        custom = isinstance(full, Tensor) and full.ndim == 4 and prepared is None
        on_past = cache is not None and not custom and self._has_past(cache)
        mla["absorb"] = on_past and hidden_states.shape[1] == 1
        if mla["absorb"]:
            mla["cache_starts"] = _first_visible(full)
        elif on_past and (length := self._plain_length(cache, full, hidden_states.shape[1])) is not None:
            mla["lengths"] = [length] * len(hidden_states)
        else:
            mla["attention_mask"] = full if prepared else create_causal_mask(**shared)
        return arguments | {"full_attention": mla}

    def _plain_length(self, cache: Cache | None, mask: Tensor | None, new: int) -> int | None:
        """Tokens of every sequence with the new ones, for `mla_prefill`; None where that is not for these.

        It reads all rows up to a length: padding that stands before a sequence would count. Its gradients take memory
        for all scores. And it wants numbers on the host, which a static cache and a mask have on the device: whoever
        compiles the model would have the graph broken.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        length = int(self._seen_tokens(cache)) + new
        return length if mask is None or bool((_visible(mask).sum(-1) == length).all()) else None

    def _has_past(self, cache: Cache) -> bool:
        layer: Any = cache.layers[self.config.mla_layers[0]]
        return bool(layer.is_initialized)


class HyloForCausalLM(HyloPreTrainedModel, GenerationMixin):
    """A hybrid language model out of a Llama or Qwen3 checkpoint; used like any transformers causal LM."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HyloConfig) -> None:
        super().__init__(config)
        self.model = HyloModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vocab_size = config.vocab_size
        self.post_init()

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]  # here it depends on the layout
        """Without MLA no layer counts tokens, which generate() asks a cache of its own for; the model then makes it."""
        return bool(self.config.mla_layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] (of the last `logits_to_keep` tokens if given) and, with `labels`, the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        logits: Any = self.lm_head(hidden) if torch.is_grad_enabled() else product(hidden, self.lm_head)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _first_visible(mask: Tensor | None) -> Tensor | None:
    """[B] int32: how many leading positions of each row are padding; None if there is no mask."""
    return None if mask is None else (~_visible(mask)).cumprod(-1).sum(-1, dtype=torch.int32)


def _visible(mask: Tensor) -> Tensor:
    """[B, S] bool: what the last token sees.

    mask: [B, S] with 1 for tokens, or a prepared 4-D mask, bool or additive.
    """
    if mask.ndim == 2:
        return mask != 0
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0
