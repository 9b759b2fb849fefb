"""Inference of a hybrid model on caches of its own: chunked prefill, decode as one CUDA graph, streamed tokens."""

from hylo.inference.engine import Engine
from hylo.inference.sampling import GREEDY, Sampling

__all__ = ["GREEDY", "Engine", "Sampling"]
