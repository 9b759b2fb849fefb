"""Token mixers: projections around one call of `hylo_ops` each."""

from torch import nn

from hylo.config import HyloConfig
from hylo.mixers.gated_deltanet import GatedDeltaNet
from hylo.mixers.mamba2 import Mamba2
from hylo.mixers.mla import MultiHeadLatentAttention

_CLASSES: dict[str, type[nn.Module]] = {
    "mla": MultiHeadLatentAttention,
    "gated_deltanet": GatedDeltaNet,
    "mamba2": Mamba2,
}


def make_mixer(config: HyloConfig, layer_idx: int) -> nn.Module:
    assert config.mixer_types is not None
    return _CLASSES[config.mixer_types[layer_idx]](config, layer_idx)


__all__ = ["GatedDeltaNet", "Mamba2", "MultiHeadLatentAttention", "make_mixer"]
