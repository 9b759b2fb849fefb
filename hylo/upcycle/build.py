"""A hybrid in memory, out of a loaded base and a configuration."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylo.config import HyloConfig
from hylo.errors import UserError
from hylo.model import HyloForCausalLM
from hylo.upcycle.base import attention_weights
from hylo.upcycle.calibrate import InputMoments, fit_outputs, input_moments, sample_text
from hylo.upcycle.to_gated_deltanet import aligned_gated_deltanet, published_gated_deltanet
from hylo.upcycle.to_mamba2 import aligned_mamba2, published_mamba2
from hylo.upcycle.to_mla import MlaEnergy, aligned_mla, published_mla

Init = Literal["published", "aligned"]
INITS = ("published", "aligned")


@dataclass
class InitReport:
    """What an initialisation kept.

    energy: by MLA layer, what the ranks keep. unfitted: by layer, the share of the base's mixer output that the fitted
    mixers miss on the calibration text; empty for the published initialisation, which fits nothing.
    """

    energy: dict[int, MlaEnergy] = field(default_factory=dict)
    unfitted: dict[int, float] = field(default_factory=dict)


def build_hybrid(
    base: PreTrainedModel,
    config: HyloConfig,
    *,
    init: Init = "published",
    seed: int = 42,
    calibration: Tensor | None = None,
) -> tuple[HyloForCausalLM, InitReport]:
    """The hybrid of a loaded base: mixers initialised from its attention, everything else copied.

    Args:
        config: from `hybrid_config`.
        init: "published" or "aligned" (docs/upcycling.md).
        seed: of what starts at random, and of the calibration text.
        calibration: [N, T] int64. Token ids that "aligned" measures the base on; None lets the base write them.
    Raises:
        UserError: unknown init, or "aligned" with another rope theta than the base's.
    """
    _check_init(init, base, config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hybrid = HyloForCausalLM(config)
    hybrid.to(base.dtype)  # type: ignore[arg-type]
    hybrid.eval()
    _copy_shared(base, hybrid)
    report = InitReport()
    if init == "published":
        _fill_mixers(base, hybrid, None, report)
        return hybrid, report
    ids = sample_text(base, seed=seed) if calibration is None else calibration
    _fill_mixers(base, hybrid, input_moments(base, ids), report)
    report.unfitted = dict(enumerate(fit_outputs(hybrid, base, ids)))
    return hybrid, report


def _check_init(init: str, base: PreTrainedModel, config: HyloConfig) -> None:
    if init not in INITS:
        raise UserError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    assert config.rope_parameters is not None
    ours, theirs = config.rope_parameters["rope_theta"], base.config.rope_parameters["rope_theta"]
    if init == "aligned" and ours != theirs:
        raise UserError(f"the aligned initialisation keeps the base's rope theta {theirs}, got {ours}")


@torch.no_grad()
def _copy_shared(base: PreTrainedModel, hybrid: HyloForCausalLM) -> None:
    """Embedding, head, norms and MLPs. A tied head becomes a copy of its own."""
    source, target = base.state_dict(), hybrid.state_dict()
    for name, tensor in target.items():
        if ".mixer." not in name:
            tensor.copy_(source[name])


@torch.no_grad()
def _fill_mixers(
    base: PreTrainedModel, hybrid: HyloForCausalLM, moments: list[InputMoments] | None, report: InitReport
) -> None:
    """Initialise every mixer: aligned to the measured inputs of its layer, or as published if there are none."""
    mixer_types = hybrid.config.mixer_types
    assert mixer_types is not None
    for i, kind in enumerate(mixer_types):
        mixer: nn.Module = hybrid.model.layers[i].mixer
        weights, fresh = attention_weights(base, i), mixer.state_dict()
        if kind == "mla":
            state, report.energy[i] = (
                aligned_mla(weights, hybrid.config, moments[i].second)
                if moments
                else published_mla(weights, hybrid.config)
            )
        elif kind == "gated_deltanet":
            state = (
                aligned_gated_deltanet(weights, fresh, hybrid.config, moments[i])
                if moments
                else published_gated_deltanet(weights, fresh)
            )
        else:
            state = aligned_mamba2(weights, fresh, moments[i]) if moments else published_mamba2(weights, fresh)
        mixer.load_state_dict(state)
