"""Configuration of a hybrid model, and the layouts that the HyLo paper published."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from hylo.errors import UserError

MIXERS = ("mla", "gated_deltanet", "mamba2")
LINEAR_MIXERS = ("gated_deltanet", "mamba2")


class HyloConfig(PreTrainedConfig):
    """A decoder whose layers mix tokens by latent attention or by a recurrence.

    Args:
        mixer_types: for each layer "mla", "gated_deltanet" or "mamba2". `layer_types`, which caches are made from,
            follows from it.
        head_dim: width of a head of the model it came from; also width and state width of a Mamba2 head.
        num_key_value_heads: heads of the MLA up-projection, and of x and B in Mamba2.
        q_lora_rank, kv_lora_rank: latent ranks of MLA, in elements.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: widths of an MLA head; the rope width may be 0.
        qk_norm: RMS norm of each query and key head before the rotation, as in Qwen3.
        linear_num_heads, linear_key_head_dim, linear_value_head_dim: heads of Gated DeltaNet.
        linear_conv_kernel_dim: width of the short convolutions, in tokens.
        linear_norm_eps: eps of the gated norms.
        rope_parameters: as in transformers; it acts on the rope slice of the MLA layers alone.
    Source: arXiv 2604.24715.
    """

    model_type = "hylo"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None

    mixer_types: list[str] | None = None
    layer_types: list[str] | None = None
    q_lora_rank: int = 1344
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    qk_norm: bool = False
    linear_num_heads: int = 6
    linear_key_head_dim: int = 256
    linear_value_head_dim: int = 512
    linear_conv_kernel_dim: int = 4
    linear_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixer_types is None:
            self.mixer_types = ["gated_deltanet"] * self.num_hidden_layers
        self._check()
        self.layer_types = ["full_attention" if m == "mla" else "linear_attention" for m in self.mixer_types]
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)

    @property
    def qk_head_dim(self) -> int:
        """Width of an expanded query or key head of MLA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def mla_layers(self) -> list[int]:
        return [i for i, mixer in enumerate(self.mixer_types or ()) if mixer == "mla"]

    def _check(self) -> None:
        assert self.mixer_types is not None
        unknown = [m for m in self.mixer_types if m not in MIXERS]
        if unknown:
            raise UserError(f"mixer_types must be of {list(MIXERS)}, got {unknown[0]!r}")
        if len(self.mixer_types) != self.num_hidden_layers:
            raise UserError(
                f"mixer_types must name one mixer for each of num_hidden_layers = {self.num_hidden_layers}, "
                f"got {len(self.mixer_types)}"
            )
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "linear_num_heads"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.qk_rope_head_dim < 0 or self.qk_rope_head_dim % 2:
            raise UserError(f"qk_rope_head_dim must be even and not negative, got {self.qk_rope_head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )


def place_mla(num_layers: int, mla_layers: Sequence[int], mixer: str) -> list[str]:
    """`mixer_types` with MLA at the given layers and `mixer` everywhere else."""
    return ["mla" if i in set(mla_layers) else mixer for i in range(num_layers)]


_LLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "vocab_size": 128256,
    "q_lora_rank": 1344,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "linear_num_heads": 6,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
_LLAMA_3B: dict[str, Any] = _LLAMA_1B | {
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "head_dim": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_num_heads": 9,
}
_LLAMA_8B: dict[str, Any] = _LLAMA_3B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "q_lora_rank": 2048,
    "kv_lora_rank": 160,
}
_QWEN_1_7B: dict[str, Any] = _LLAMA_3B | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 1344,
    "kv_lora_rank": 256,
    "qk_norm": True,
    "linear_num_heads": 6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}

# name of the layout -> (dims of the base, layers that become MLA, mixer of all others)
_LAYOUTS: dict[str, tuple[dict[str, Any], Sequence[int], str]] = {
    "Llama-4MLA12GDN": (_LLAMA_1B, (1, 5, 10, 14), "gated_deltanet"),
    "Llama-4MLA12M2": (_LLAMA_1B, (1, 5, 10, 14), "mamba2"),
    "Llama-8MLA8GDN": (_LLAMA_1B, range(0, 16, 2), "gated_deltanet"),
    "Llama-8MLA8M2": (_LLAMA_1B, range(0, 16, 2), "mamba2"),
    "Llama-6MLA22GDN": (_LLAMA_3B, (0, 5, 10, 16, 21, 26), "gated_deltanet"),
    "Llama-6MLA22M2": (_LLAMA_3B, (0, 5, 10, 16, 21, 26), "mamba2"),
    "Llama-14MLA14GDN": (_LLAMA_3B, range(0, 28, 2), "gated_deltanet"),
    "Llama-14MLA14M2": (_LLAMA_3B, range(0, 28, 2), "mamba2"),
    "Qwen-7MLA21GDN": (_QWEN_1_7B, range(1, 28, 4), "gated_deltanet"),
    "Qwen-7MLA21M2": (_QWEN_1_7B, range(1, 28, 4), "mamba2"),
    "Qwen-14MLA14GDN": (_QWEN_1_7B, range(0, 28, 2), "gated_deltanet"),
    "Qwen-14MLA14M2": (_QWEN_1_7B, range(0, 28, 2), "mamba2"),
    "8B-8MLA24M2": (_LLAMA_8B, (0, 4, 8, 12, 16, 20, 25, 30), "mamba2"),
}


def published_variants(context_length: int = 8192) -> dict[str, HyloConfig]:
    """Every layout of the paper by name, with the rotary settings of one trained length.

    Args:
        context_length: 8192 or 65536 tokens, the two lengths that were released.
    """
    if context_length not in (8192, 65536):
        raise UserError(f"context_length must be 8192 or 65536, got {context_length}")
    return {
        name: HyloConfig(
            **dims,
            mixer_types=place_mla(dims["num_hidden_layers"], mla_layers, mixer),
            max_position_embeddings=context_length,
            rope_parameters=_published_rope(bool(dims.get("qk_norm")), context_length),
        )
        for name, (dims, mla_layers, mixer) in _LAYOUTS.items()
    }


def _published_rope(qwen: bool, context_length: int) -> dict[str, Any]:
    """YaRN stretches a window of 2,048 tokens for Llama; Qwen needs it beyond its own 32,768 alone."""
    theta, window = (1e6, 32768) if qwen else (5e5, 2048)
    if context_length <= window:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": context_length / window,
        "original_max_position_embeddings": window,
    }
