"""Distillation in named stages from one strict recipe: layer-wise alignment, teacher KL, language modelling."""

from hylo.distill.recipe import Recipe, load_recipe, parse_recipe
from hylo.distill.stages import run_recipe

__all__ = ["Recipe", "load_recipe", "parse_recipe", "run_recipe"]
