"""Whole-block and whole-step forms that join several operators: the only place that may."""

from hylo_ops.fused.gated_delta_rule import gated_delta_rule_step
from hylo_ops.fused.linear import linear_step
from hylo_ops.fused.mamba2 import mamba2_scan, mamba2_step
from hylo_ops.fused.mla import mla_step

__all__ = ["gated_delta_rule_step", "linear_step", "mamba2_scan", "mamba2_step", "mla_step"]
