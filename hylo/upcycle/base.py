"""Loading and checking a base checkpoint: what can be wrong with its files is found before any weight is read."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hylo.errors import UserError

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# what a HyLo layer has no place for, by the key of config.json that switches it on
_FOREIGN = {
    "attention_bias": "attention biases",
    "mlp_bias": "MLP biases",
    "use_sliding_window": "sliding-window attention",
    "quantization_config": "quantised weights",
}


@dataclass(frozen=True)
class AttentionWeights:
    """One attention layer of a base: q [Hq*h, D], k and v [Hkv*h, D], o [D, Hq*h], norms [h] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    head_dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        return self.q.shape[1]

    @property
    def heads(self) -> int:
        return self.q.shape[0] // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0] // self.head_dim

    def per_head(self, weight: Tensor) -> Tensor:
        """[H*h, D] -> [H, h, D]"""
        return weight.view(-1, self.head_dim, self.hidden_size)

    def with_norms_folded(self, moment: Tensor) -> "AttentionWeights":
        """Queries and keys in the scale that attention sees: divided by a head's expected RMS, times the norm's weight.

        Args:
            moment: [D, D]. Second moment E[x xT] of the layer's input.
        """
        if self.q_norm is None or self.k_norm is None:
            return self
        folded = []
        for weight, norm in ((self.q, self.q_norm), (self.k, self.k_norm)):
            rows = self.per_head(weight)
            folded.append((rows / expected_rms(rows, moment) * norm[:, None]).reshape(weight.shape))
        return replace(self, q=folded[0], k=folded[1], q_norm=None, k_norm=None)


def expected_rms(rows: Tensor, moment: Tensor) -> Tensor:
    """RMS over a head of rows @ x: rows [H, h, D], moment [D, D] -> [H, 1, 1]."""
    energy = torch.einsum("hid,de,hie->hi", rows, moment, rows)
    return energy.mean(1).clamp_min(torch.finfo(rows.dtype).tiny).sqrt()[:, None, None]


def attention_weights(model: PreTrainedModel, layer: int) -> AttentionWeights:
    """Attention of layer `layer` of a loaded base, detached."""
    attention = model.get_submodule(f"model.layers.{layer}.self_attn")
    weights = attention.state_dict()
    q, k, v, o = (weights[f"{name}_proj.weight"] for name in "qkvo")
    norms = (weights.get(f"{name}_norm.weight") for name in "qk")
    return AttentionWeights(q, k, v, o, model.config.head_dim, *norms)


def load_base(directory_or_hub_id: str) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Load a Llama or Qwen3 checkpoint on the CPU, in float32 (float64 if it is stored so), for evaluation.

    Raises:
        UserError: no such directory or model, unsupported architecture, a missing, truncated or incomplete file.
    """
    directory = base_directory(directory_or_hub_id)
    config = load_base_config(directory)
    check_weight_files(directory)
    dtype = torch.float64 if config.dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": "sdpa"}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the weights of '{directory}': {' '.join(str(error).split())[:300]}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"the weights of '{directory}' lack '{sorted(info['missing_keys'])[0]}'")
    return model.eval(), config


def base_directory(directory_or_hub_id: str) -> Path:
    """The directory of a base, fetched from the Hugging Face Hub if the name is not a directory.

    Raises:
        UserError: neither a directory nor a model of the Hub.
    """
    path = Path(directory_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(directory_or_hub_id):
        raise UserError(f"base directory '{directory_or_hub_id}' does not exist")
    try:
        return Path(snapshot_download(directory_or_hub_id, allow_patterns=list(_FILES)))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"base '{directory_or_hub_id}' is neither a directory nor a model that the Hub gives: {reason}"
        ) from error


def load_base_config(directory: Path) -> PreTrainedConfig:
    """The base's configuration, checked for everything that upcycling does not support.

    Raises:
        UserError: config.json is missing or no JSON, or names something unsupported.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"base '{directory}' has no config.json")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' is not JSON: {error}") from error
    names = values.get("architectures") or [values.get("model_type")]
    if names[0] not in SUPPORTED and names[0] not in SUPPORTED.values():
        raise UserError(f"base '{directory}' is a {names[0]!r}; supported are {', '.join(SUPPORTED)}")
    for key, what in _FOREIGN.items():
        if values.get(key):
            raise UserError(f"base '{directory}' has {what} ({key} in its config.json), which are not supported")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise UserError(f"'{path}' is not a model configuration: {' '.join(str(error).split())[:300]}") from error
    return config


def check_weight_files(directory: Path) -> None:
    """Compare every weight file with its own header.

    Raises:
        UserError: no weight file, a missing shard, or a truncated file.
    """
    for path in _weight_files(directory):
        if not path.is_file():
            raise UserError(f"weight file '{path}' is missing")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"weight file '{path}' is truncated or no safetensors file: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{index}' is no index of safetensors shards: {error}") from error
    return [directory / name for name in sorted(names)]
