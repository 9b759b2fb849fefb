"""What all measurements share: the state a model is evaluated in, and text as tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """No gradients and eval mode inside, the model's own mode restored after."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` and nothing else: no special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
