"""Whole-block and whole-step forms that join several operators: the only place that may."""

from hylo_ops.fused.mla import mla_step

__all__ = ["mla_step"]
