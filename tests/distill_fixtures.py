"""Tiny models, tokenizers and recipes for the distillation tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hylo.distill import Recipe, load_recipe

VOCABULARY = 258
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "


def byte_tokenizer(*, bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token a byte, after <s> = 0 and </s> = 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def save_llama(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    return save_base(directory, "llama", seed=seed, **changes)


def save_base(directory: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """A random two-layer Llama or Qwen3 of width 16 with its tokenizer."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(seed)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    model(config(**(values | changes))).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def write_text(path: Path, repeat: int = 60) -> Path:
    path.write_text("".join(f"{i}: {TEXT}" for i in range(repeat)), encoding="utf-8")
    return path


def recipe_values(root: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A recipe's values with everything under `root`; stages are filled up to short ones."""
    default = {"sequence_length": 16, "batch_size": 2, "learning_rate": 1e-3, "steps": 3, "log_every": 1}
    return {
        "name": "tiny",
        "output": str(root / "run"),
        "student": {"path": str(root / "student")},
        "teacher": str(root / "teacher"),
        "data": {"sources": [{"text": str(root / "text.txt")}], "cache_dir": str(root / "cache")},
        "stages": [default | stage for stage in stages],
        "device": "cpu",
    } | changes


def make_world(root: Path) -> Path:
    """student/, teacher/ and text.txt under `root`."""
    save_llama(root / "student", seed=1)
    save_llama(root / "teacher", seed=2)
    write_text(root / "text.txt")
    return root


def quiet() -> Console:
    """A console whose output is in `console.file`."""
    return Console(file=io.StringIO(), width=120)


def logged(root: Path) -> list[dict[str, Any]]:
    """The rows of the run's log."""
    return [json.loads(line) for line in (root / "run" / "log.jsonl").read_text().splitlines()]


def shipped(name: str) -> Path:
    """A recipe of the repository."""
    return Path(__file__).parents[1] / "recipes" / name


def shrunk(name: str, root: Path, *, steps: int = 4) -> Recipe:
    """A shipped recipe on a tiny base and teacher of its family under `root`: 16 tokens, then twice as many a stage."""
    path = shipped(name)
    family = "qwen3" if name.startswith("qwen3") else "llama"
    save_base(root / "base", family, num_hidden_layers=3)
    save_base(root / "teacher", family, num_hidden_layers=4, hidden_size=24)
    write_text(root / "text.txt")
    dims = {"q_lora_rank": 8, "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 4,
            "linear_num_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 8}  # fmt: skip
    values = {f"student.upcycle.{key}": value for key, value in dims.items()} | {
        "output": root / "run",
        "teacher": root / "teacher",
        "student.upcycle.base": root / "base",
        "student.upcycle.mla_layers": [1],
        "data.sources": f"[{{text: {root / 'text.txt'}}}]",
        "data.cache_dir": root / "cache",
        "device": "cpu",
    }
    for i in range(len(load_recipe(path).stages)):
        stage = {"sequence_length": 16 * 2**i, "batch_size": 2, "gradient_accumulation": 1, "epochs": "null",
                 "steps": steps, "log_every": 1}  # fmt: skip
        values |= {f"stages.{i}.{key}": value for key, value in stage.items()}
    return load_recipe(path, overrides=[f"{key}={value}" for key, value in values.items()])
