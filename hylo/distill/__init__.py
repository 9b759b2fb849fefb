"""Distillation in named stages from one strict recipe: layer-wise alignment, teacher KL, language modelling."""

from hylo.distill.recipe import Recipe, load_recipe, load_strict, parse_recipe, parse_strict
from hylo.distill.stages import run_recipe

__all__ = ["Recipe", "load_recipe", "load_strict", "parse_recipe", "parse_strict", "run_recipe"]
