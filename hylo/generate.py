"""`hylo generate` without the command line: a checkpoint and a prompt in, text out."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hylo  # noqa: F401  registers the Auto classes
from hylo.errors import UserError


def generate_text(
    model_dir: Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    prefill_chunk_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> str:
    """Continue `prompt` with the model and tokenizer in `model_dir`; the prompt is part of the result.

    Args:
        temperature: 0 takes the likeliest token, above it samples.
        prefill_chunk_size: tokens of the prompt read at a time, which bounds memory; None reads it whole.
    Raises:
        UserError: no checkpoint in `model_dir`, an empty prompt, or one that leaves no room in the position table.
    """
    if not (model_dir / "config.json").is_file():
        raise UserError(f"'{model_dir}' holds no model: there is no config.json in it")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    if ids.shape[1] == 0:
        raise UserError(f"the prompt must hold at least one token, got {prompt!r}")
    limit = AutoConfig.from_pretrained(model_dir).max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        raise UserError(f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the model's {limit}")
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    model.to(device).eval()
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        prefill_chunk_size=prefill_chunk_size,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    return str(tokenizer.decode(found[0], skip_special_tokens=True))
