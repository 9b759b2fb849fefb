"""A pretrained Llama or Qwen3 checkpoint becomes a hybrid: initialisations, assembly, and the directory they make."""

from hylo.upcycle.assemble import assemble, assembled_config
from hylo.upcycle.base import load_base
from hylo.upcycle.build import InitReport, build_hybrid
from hylo.upcycle.command import UpcycleResult, upcycle
from hylo.upcycle.dims import default_dims, hybrid_config

__all__ = [
    "InitReport",
    "UpcycleResult",
    "assemble",
    "assembled_config",
    "build_hybrid",
    "default_dims",
    "hybrid_config",
    "load_base",
    "upcycle",
]
