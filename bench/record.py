"""What every recorded result says of itself: commit, date, GPU, versions."""

import datetime
import importlib.metadata
import sys
from typing import Any

import torch

from hylo.provenance import source_commit

PACKAGES = [
    *("hylo", "torch", "triton", "cuda-core", "nvidia-cuda-nvrtc"),
    *("flash-linear-attention", "fla-core", "flash-qla", "tilelang", "flashinfer-python", "nvidia-cutlass-dsl"),
    *("mamba-ssm", "causal-conv1d", "vllm", "liger-kernel", "transformers"),
]


def commit() -> str:
    """The commit of this checkout, "unknown" without git."""
    return source_commit() or "unknown"


def meta(named_commit: str | None) -> dict[str, Any]:
    """Args: the commit, where there is no git to ask."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": named_commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "versions": versions,
    }
