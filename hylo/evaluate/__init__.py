"""Evaluation of any Hugging Face causal LM: held-out loss, needle retrieval, cache and state bytes, a report."""

from hylo.evaluate.cache import CacheBytes, cache_bytes, cache_nbytes, crossover_tokens, measure_cache
from hylo.evaluate.command import evaluate_command
from hylo.evaluate.common import encode_text
from hylo.evaluate.needle import (
    CODE_NEEDLE,
    NEEDLE_KEYS,
    PROSE_NEEDLE,
    ModelReader,
    NeedleGrid,
    NeedleSettings,
    NeedleTemplate,
    build_cases,
    needle_grid,
)
from hylo.evaluate.perplexity import LossReport, held_out_loss
from hylo.evaluate.plots import write_plots
from hylo.evaluate.report import EvaluationReport, evaluate, render_table

__all__ = [
    "CODE_NEEDLE",
    "NEEDLE_KEYS",
    "PROSE_NEEDLE",
    "CacheBytes",
    "EvaluationReport",
    "LossReport",
    "ModelReader",
    "NeedleGrid",
    "NeedleSettings",
    "NeedleTemplate",
    "build_cases",
    "cache_bytes",
    "cache_nbytes",
    "crossover_tokens",
    "encode_text",
    "evaluate",
    "evaluate_command",
    "held_out_loss",
    "measure_cache",
    "needle_grid",
    "render_table",
    "write_plots",
]
