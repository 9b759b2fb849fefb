"""Public function that chooses the next token of each sequence."""

import math

import torch
from torch import Tensor

from hylo_ops import checks
from hylo_ops.backend import Backend
from hylo_ops.library import define_op
from hylo_ops.sampling import reference, triton

_DRAWS = 32  # with top_p, of which one in 1 / top_p counts: more are needed once in 1e10 calls


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """A token of each row, drawn from softmax(logits / temperature) of those that are left:

        top_k: the so many likeliest;   top_p: after it, the fewest likeliest that together reach this probability

    Of equals of which some are left, which ones is not defined.

    Dims: B batch, V vocabulary.
    Args:
        logits: [B, V] bf16 | fp16 | fp32 | fp64. -inf is never drawn; a row has something else. Rows may be strided.
        temperature: 0 takes the likeliest token, the first of equals, whatever top_k and top_p are.
        top_k: at least 1; all are left if None.
        top_p: above 0, at most 1; all are left if None.
        generator: of the device's uniform numbers; PyTorch's own if None. A CUDA graph has to know it.
        backend: None picks the first that supports the inputs; a named one never falls back.
    Returns:
        tokens: [B] int64.
    Raises:
        ValueError: a shape, dtype or number above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend cannot run these inputs; the message says why.
    Numerics: weights and sums in fp32 (fp64 for fp64); the same numbers give the same tokens; never synchronises.
    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), for top_p.
    """
    checks.shape("logits", logits, "B", "V")
    checks.dtype("logits", logits, checks.FLOATS)
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have a vocabulary, got {list(logits.shape)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0 on, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    numbers = 0 if temperature == 0 else 1 if top_p is None or top_p == 1 else 2 * _DRAWS - 1
    uniforms = torch.rand(logits.shape[0], numbers, generator=generator, device=logits.device)
    tokens: Tensor = _sample(logits, uniforms, float(temperature), top_k, top_p, backend)
    return tokens


def _fake(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


BACKENDS = [
    Backend("triton", triton.why_not, triton.forward),
    Backend("reference", lambda **_: None, reference.forward),
]

_sample = define_op(
    "sample_tokens",
    "(Tensor logits, Tensor uniforms, float temperature, int? top_k, float? top_p, str? backend) -> Tensor",
    backends=BACKENDS,
    fake=_fake,
)
