"""Named shapes: the published models at training and decode sizes, with the letters of the naming legend."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormCase:
    """x and gate [B, T, H, V]; Gated DeltaNet shares one weight [V] and norms first, Mamba2 has [H, V], gates first."""

    name: str
    B: int
    T: int
    H: int
    V: int
    norm_before_gate: bool
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, "V": self.V}


GATED_RMS_NORM = [
    NormCase("gdn-1b-8k", 1, 8192, 6, 512, True),
    NormCase("gdn-1b-64k", 1, 65536, 6, 512, True),
    NormCase("gdn-3b-8k", 1, 8192, 9, 512, True),
    NormCase("mamba2-1b-8k", 1, 8192, 32, 64, False),
    NormCase("mamba2-1b-64k", 1, 65536, 32, 64, False),
    NormCase("mamba2-qwen-8k", 1, 8192, 16, 128, False),
    NormCase("mamba2-3b-8k", 1, 8192, 24, 128, False),
    NormCase("gdn-1b-8k-fp32", 1, 8192, 6, 512, True, torch.float32),
    NormCase("mamba2-1b-8k-fp32", 1, 8192, 32, 64, False, torch.float32),
    NormCase("gdn-1b-decode-1", 1, 1, 6, 512, True),
    NormCase("gdn-1b-decode-64", 64, 1, 6, 512, True),
    NormCase("mamba2-1b-decode-1", 1, 1, 32, 64, False),
    NormCase("mamba2-1b-decode-64", 64, 1, 32, 64, False),
]
