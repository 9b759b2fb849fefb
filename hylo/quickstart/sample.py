"""Text written by teacher and hybrid after the same lines of Python."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hylo.evaluate.common import evaluating

PROMPT = '''class Stack:
    """A last-in, first-out collection of items."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
'''
MAX_NEW_TOKENS = 160
SEED = 0


def continuation(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What `model` writes after `PROMPT`: drawn with a fixed seed, for greedy small models repeat themselves."""
    ids = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    prompt = torch.tensor([ids])
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(SEED)
    with evaluating(model):
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    return str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
