"""`hylo upcycle`: a base checkpoint in, the directory of a hybrid out, whole or not at all."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hylo.atomic import atomic_directory
from hylo.config import HyloConfig
from hylo.errors import UserError
from hylo.upcycle.base import base_directory, load_base, load_base_config
from hylo.upcycle.build import Init, InitReport, build_hybrid
from hylo.upcycle.dims import DIMS, hybrid_config

_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class UpcycleResult:
    """out: directory of the hybrid. report: what the initialisation kept."""

    out: Path
    config: HyloConfig
    report: InitReport


def upcycle(
    base: str | Path,
    *,
    mixer: str,
    mla_layers: Sequence[int],
    out: str | Path,
    init: Init = "published",
    seed: int = 42,
    rope_parameters: dict[str, Any] | None = None,
    max_position_embeddings: int | None = None,
    **dims: int | None,
) -> UpcycleResult:
    """Turn a Llama or Qwen3 checkpoint into a hybrid and write it, tokenizer included.

    Beside the model stands `upcycle.json`: base, initialisation, seed, and what the initialisation kept.

    Args:
        base: directory or Hugging Face hub id.
        mixer: "gated_deltanet" or "mamba2", of every layer that is not in `mla_layers`.
        mla_layers: counted from 0; empty for a pure linear model, all of them for a pure MLA model.
        out: new directory.
        init: "published" or "aligned" (docs/upcycling.md).
        rope_parameters, max_position_embeddings, dims: as for `hybrid_config`.
    Raises:
        UserError: wrong input, an `out` that exists, or a full disk; nothing is written then.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"output directory '{out}' exists already")
    directory = base_directory(str(base))
    config = hybrid_config(
        load_base_config(directory),
        mixer=mixer,
        mla_layers=mla_layers,
        rope_parameters=rope_parameters,
        max_position_embeddings=max_position_embeddings,
        **dims,
    )
    model, _ = load_base(str(directory))
    hybrid, report = build_hybrid(model, config, init=init, seed=seed)
    with atomic_directory(out) as partial:
        hybrid.save_pretrained(partial)
        _copy_companions(directory, partial)
        _write_origin(partial / "upcycle.json", str(base), config, init, seed, report)
    return UpcycleResult(out, config, report)


def _copy_companions(directory: Path, out: Path) -> None:
    """Tokenizer and generation configuration, byte for byte."""
    for name in _COMPANIONS:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)


def _write_origin(path: Path, base: str, config: HyloConfig, init: Init, seed: int, report: InitReport) -> None:
    origin = {
        "base": base,
        "init": init,
        "seed": seed,
        "mixer_types": config.mixer_types,
        "dims": {name: getattr(config, name) for name in DIMS},
        "energy": {str(layer): asdict(energy) for layer, energy in report.energy.items()},
        "unfitted": {str(layer): share for layer, share in report.unfitted.items()},
    }
    path.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
