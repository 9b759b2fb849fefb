"""Rotary positions of the MLA rope slice, with transformers' scaling types (YaRN among them)."""

import copy

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo.config import HyloConfig


def frequencies(config: HyloConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [E / 2] in radians per token, and the factor of cos and sin (YaRN's 0.1 ln(s) + 1)."""
    assert config.rope_parameters is not None
    width, parameters = config.qk_rope_head_dim, config.rope_parameters
    if width == 0:
        return torch.empty(0), 1.0
    if parameters["rope_type"] == "default":
        return parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0
    rope_slice = copy.copy(config)  # transformers reads the rotated width off the head width
    rope_slice.head_dim = width
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](rope_slice, torch.device("cpu"))


class Rotary(nn.Module):
    """cos and sin of the rope slice. The frequencies are no parameters and are made anew at every load."""

    def __init__(self, config: HyloConfig) -> None:
        super().__init__()
        self.config = config
        self._inverse: Tensor | None = None
        self._factor = 1.0

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids [B or 1, T] -> cos, sin [B or 1, T, E], half-split as `rotate` takes them."""
        if self._inverse is None or self._inverse.device != position_ids.device:
            inverse, self._factor = frequencies(self.config)
            self._inverse = torch.cat([inverse, inverse]).to(position_ids.device)
        angles = position_ids[..., None] * self._inverse  # in fp32
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1:  # a launch each, in a step
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, E] turned pair by pair (i, i + E/2), in its dtype; cos, sin [B or 1, T, E]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]).to(x.dtype)
