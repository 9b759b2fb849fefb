"""Named shapes: the published models at training and decode sizes, with the letters of the naming legend."""

from dataclasses import dataclass, field
from typing import Any

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

    @property
    def passes(self) -> tuple[str, ...]:
        return ("decode",) if self.T == 1 else ("forward", "forward_backward")


GATED_RMS_NORM = [
    NormCase("gdn-1b-8k", 1, 8192, 6, 512, True),
    NormCase("gdn-1b-64k", 1, 65536, 6, 512, True),
    NormCase("gdn-3b-8k", 1, 8192, 9, 512, True),
    NormCase("mamba2-1b-8k", 1, 8192, 32, 64, False),
    NormCase("mamba2-1b-64k", 1, 65536, 32, 64, False),
    NormCase("mamba2-qwen-8k", 1, 8192, 16, 128, False),
    NormCase("mamba2-3b-8k", 1, 8192, 24, 128, False),
    NormCase("mamba2-8k", 1, 8192, 1, 2048, False),  # Mamba2 itself: all heads in one group
    NormCase("gdn-1b-8k-fp32", 1, 8192, 6, 512, True, torch.float32),
    NormCase("mamba2-1b-8k-fp32", 1, 8192, 32, 64, False, torch.float32),
    NormCase("gdn-1b-decode-1", 1, 1, 6, 512, True),
    NormCase("gdn-1b-decode-64", 64, 1, 6, 512, True),
    NormCase("mamba2-1b-decode-1", 1, 1, 32, 64, False),
    NormCase("mamba2-1b-decode-64", 64, 1, 32, 64, False),
    NormCase("mamba2-decode-1", 1, 1, 1, 2048, False),
    NormCase("mamba2-decode-64", 64, 1, 1, 2048, False),
]


@dataclass(frozen=True)
class DeltaCase:
    """q and k [B, T, G, K], v [B, T, H, V]; one token a sequence is decode, on a state of its own dtype."""

    name: str
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    state_dtype: torch.dtype = torch.float32
    initial_state: bool = False  # decode always has one
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "G": self.G, "H": self.H, "K": self.K, "V": self.V}

    @property
    def passes(self) -> tuple[str, ...]:
        return ("decode",) if self.T == 1 else ("forward", "backward")


GATED_DELTA_RULE = [
    DeltaCase("hylo-1b-8k", 1, 8192, 6, 6, 256, 512),
    DeltaCase("hylo-1b-4x8k", 4, 8192, 6, 6, 256, 512),
    DeltaCase("hylo-1b-64k", 1, 65536, 6, 6, 256, 512),
    DeltaCase("hylo-3b-8k", 1, 8192, 9, 9, 256, 512),
    DeltaCase("hylo-3b-64k", 1, 65536, 9, 9, 256, 512),
    DeltaCase("d128-8k", 1, 8192, 16, 16, 128, 128),
    DeltaCase("d128-32k", 1, 32768, 16, 16, 128, 128),
    DeltaCase("d128-8x4k", 8, 4096, 16, 16, 128, 128),
    DeltaCase("d128-gva-64k", 1, 65536, 16, 32, 128, 128),
    DeltaCase("d128-4x8k", 4, 8192, 16, 16, 128, 128),
    DeltaCase("d64-8k", 1, 8192, 32, 32, 64, 64),
    DeltaCase("d256-64k", 1, 65536, 8, 8, 256, 256),
    # With a state to begin with: what errors its gradient has.
    DeltaCase("hylo-1b-8k-state", 1, 8192, 6, 6, 256, 512, initial_state=True),
    DeltaCase("d128-8k-state", 1, 8192, 16, 16, 128, 128, initial_state=True),
    *(
        DeltaCase(f"{name}-decode-{B}{suffix}", B, 1, *dims, state_dtype)
        for name, dims in (("d128-gva", (16, 32, 128, 128)), ("hylo-1b", (6, 6, 256, 512)))
        for state_dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16-state"))
        for B in (1, 32, 256)
    ),
]

# HyLo's shape at growing length, 4K to 1M tokens: what a token costs must not grow. Run by name only.
GATED_DELTA_RULE_LENGTHS = [
    DeltaCase(f"hylo-1b-length-{n}k", 1, n * 1024, 6, 6, 256, 512) for n in (4, 16, 64, 256, 1024)
]


@dataclass(frozen=True)
class ScanCase:
    """x [B, T, HX, V], b [B, T, GB, K], c [B, T, G, K], dt [B, T, H]; one token a sequence is decode."""

    name: str
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    HX: int
    GB: int
    state_dtype: torch.dtype = torch.float32
    initial_state: bool = False  # decode always has one
    gates: tuple[str, ...] = ("trained",)
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        letters = ("B", "T", "G", "H", "K", "V", "HX", "GB")
        return {letter: getattr(self, letter) for letter in letters}

    @property
    def passes(self) -> tuple[str, ...]:
        return ("decode",) if self.T == 1 else ("forward", "forward_backward")


_BOTH = ("trained", "strong")
# G, H, K, V, HX, GB
_HYLO_1B = (32, 32, 64, 64, 8, 8)
_HYLO_3B = (24, 24, 128, 128, 8, 8)
_QWEN = (16, 16, 128, 128, 8, 8)
_MAMBA2 = (1, 32, 128, 64, 32, 1)

SSD = [
    ScanCase("hylo-1b-8k", 1, 8192, *_HYLO_1B, gates=_BOTH),
    ScanCase("hylo-1b-8x4k", 8, 4096, *_HYLO_1B),
    ScanCase("hylo-1b-64k", 1, 65536, *_HYLO_1B),
    ScanCase("hylo-3b-8k", 1, 8192, *_HYLO_3B, gates=_BOTH),
    ScanCase("hylo-3b-64k", 1, 65536, *_HYLO_3B),
    ScanCase("qwen-8k", 1, 8192, *_QWEN, gates=_BOTH),
    ScanCase("mamba2-8k", 1, 8192, *_MAMBA2, gates=_BOTH),
    ScanCase("mamba2-32k", 1, 32768, *_MAMBA2),
    ScanCase("mamba2-8x4k", 8, 4096, *_MAMBA2),
    ScanCase("mamba2-g8-64k", 1, 65536, 8, 64, 128, 64, 64, 8),
    # With a state to begin with: what errors its gradient has.
    ScanCase("hylo-1b-8k-state", 1, 8192, *_HYLO_1B, initial_state=True),
    ScanCase("mamba2-8k-state", 1, 8192, *_MAMBA2, initial_state=True),
    *(
        ScanCase(f"{name}-decode-{B}{suffix}", B, 1, *dims, state_dtype)
        for name, dims in (("mamba2", _MAMBA2), ("hylo-1b", _HYLO_1B))
        for state_dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "-bf16-state"))
        for B in (1, 32, 256)
    ),
]

# HyLo's shape at growing length, 4K to 1M tokens: what a token costs must not grow. Run by name only.
SSD_LENGTHS = [ScanCase(f"hylo-1b-length-{n}k", 1, n * 1024, *_HYLO_1B) for n in (4, 16, 64, 256, 1024)]


@dataclass(frozen=True)
class ConvCase:
    """x [B, T, D], weight [D, W] and a bias, silu; one token a sequence is decode."""

    name: str
    B: int
    T: int
    D: int
    W: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "D": self.D, "W": self.W}

    @property
    def passes(self) -> tuple[str, ...]:
        return ("decode",) if self.T == 1 else ("forward", "forward_backward")


# Mamba2's channels at H 32, V 64, G 1, K 128, and those of Gated DeltaNet or of a repeating model at HyLo's heads.
CAUSAL_CONV1D = [
    *(ConvCase(f"d{D}-{n}k", 1, n * 1024, D) for D in (2304, 6144) for n in (8, 32, 64)),
    *(ConvCase(f"d{D}-decode-{B}", B, 1, D) for D in (2304, 6144) for B in (1, 32, 256)),
]


@dataclass(frozen=True)
class MixerCase:
    """A Mamba2 block between its projections: convolution, scan, gated norm of NG groups of heads."""

    name: str
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    HX: int
    GB: int
    NG: int
    W: int = 4
    state_dtype: torch.dtype = torch.float32
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        letters = ("B", "T", "G", "H", "K", "V", "HX", "GB", "NG", "W")
        return {letter: getattr(self, letter) for letter in letters}

    @property
    def channels(self) -> int:
        """Of the convolution: x, b and c, each with the heads it has."""
        return self.HX * self.V + (self.GB + self.G) * self.K

    @property
    def passes(self) -> tuple[str, ...]:
        return ("decode",) if self.T == 1 else ("forward", "forward_backward")


_MIXERS = (("hylo-1b", (*_HYLO_1B, 32)), ("mamba2", (*_MAMBA2, 1)))
MAMBA2 = [
    *(MixerCase(f"{name}-8k", 1, 8192, *dims) for name, dims in _MIXERS),
    *(MixerCase(f"{name}-decode-{B}", B, 1, *dims) for name, dims in _MIXERS for B in (1, 32, 256)),
]


@dataclass(frozen=True)
class LatentCase:
    """One new token of each sequence over a paged cache of rows latent | rope, [pages, page, R + E].

    Args:
        S: cached tokens of each sequence, the new one included; of the longest, where lengths are skewed.
        nope: width of a head's other part before the key up-projection, which gives the scale.
        v: width of a head's value after the value up-projection.
        HK: heads of the up-projections.
        skewed: lengths from 100 to S, log-uniform.
        fp8: whether the cache has rows of `hylo_ops.quantize_kv_cache`.
        scope: what is timed: the "attention" on latents, or the whole "step" of a layer.
    """

    name: str
    B: int
    S: int
    H: int
    R: int
    E: int
    nope: int
    v: int
    HK: int = 8
    skewed: bool = False
    fp8: bool = False
    scope: str = "attention"
    page: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int | str]:
        return {"B": self.B, "S": "skewed" if self.skewed else self.S, "H": self.H, "R": self.R, "E": self.E}

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; skewed ones in an order that is neither rising nor falling."""
        if not self.skewed:
            return (self.S,) * self.B
        order = (i * _STRIDE % self.B for i in range(self.B))
        return tuple(round(_SHORTEST * (self.S / _SHORTEST) ** (i / (self.B - 1))) for i in order)


_SHORTEST, _STRIDE = 100, 29  # the stride has no divisor in common with 64
# H, R, E, nope, v
_LATENTS = {
    "hylo-1b": (32, 128, 32, 32, 64),
    "hylo-3b": (24, 128, 64, 64, 128),
    "qwen": (16, 256, 64, 64, 128),
    "r256-e32": (32, 256, 32, 64, 64),
    "deepseek-h16": (16, 512, 64, 128, 128),
    "deepseek-h128": (128, 512, 64, 128, 128),
}
_K = 1024
_LATENT_GRID = [
    *((1, n * _K) for n in (4, 32, 128, 1024, 2048)),
    *((32, n * _K) for n in (4, 32, 128)),
    *((128, n * _K) for n in (4, 32)),
]

# A cache of "128k" tokens is what the bar calls 131K: 131072.
MLA_ABSORB = [
    *(
        case
        for name, dims in _LATENTS.items()
        for case in (
            *(LatentCase(f"{name}-{B}x{S // _K}k", B, S, *dims) for B, S in _LATENT_GRID),
            LatentCase(f"{name}-64-skewed", 64, 32 * _K, *dims, skewed=True),
        )
    ),
    *(
        LatentCase(f"{name}-step-{B}", B, 4 * _K, *_LATENTS[name], scope="step")
        for name in ("hylo-1b", "hylo-3b")
        for B in (1, 32)
    ),
]

MLA_ABSORB_FP8 = [
    LatentCase(f"{name}-{B}x{S // _K}k-fp8", B, S, *_LATENTS[name], fp8=True)
    for name in ("hylo-1b", "qwen", "deepseek-h16", "deepseek-h128")
    for B, S in ((1, 4 * _K), (1, 128 * _K), (32, 4 * _K), (32, 32 * _K))
]

# 5 to 19 GB of cache, and as much again for each layout that a peer wants. Run by name only.
MLA_ABSORB_LARGE = [LatentCase(f"{name}-128x128k", 128, 128 * _K, *dims) for name, dims in _LATENTS.items()]


@dataclass(frozen=True)
class HeadCase:
    """hidden [N, D] under a head of V classes; KL to a teacher of width DT, or cross-entropy without one."""

    name: str
    N: int
    D: int
    DT: int | None
    V: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        letters = {"N": self.N, "D": self.D, "DT": self.DT, "V": self.V}
        return {letter: size for letter, size in letters.items() if size is not None}


_LLAMA_VOCABULARY, _QWEN_VOCABULARY = 128256, 151936

# Students of 1B, 3B and Qwen's 1.7B, teachers of 8B. The logits of 65536 tokens fit nowhere at once.
LINEAR_KL = [
    HeadCase("llama-1b-8k", 8 * _K, 2048, 4096, _LLAMA_VOCABULARY),
    HeadCase("llama-1b-64k", 64 * _K, 2048, 4096, _LLAMA_VOCABULARY),
    HeadCase("llama-3b-8k", 8 * _K, 3072, 4096, _LLAMA_VOCABULARY),
    HeadCase("qwen-8k", 8 * _K, 2048, 4096, _QWEN_VOCABULARY),
    HeadCase("llama-1b-8k-ce", 8 * _K, 2048, None, _LLAMA_VOCABULARY),
    HeadCase("llama-1b-64k-ce", 64 * _K, 2048, None, _LLAMA_VOCABULARY),
]


@dataclass(frozen=True)
class PrefillCase(LatentCase):
    """T new tokens of each sequence over a paged cache that holds their rows, too: they are the last of S.

    Args:
        slice_tokens: how many cached tokens are expanded at once.
    """

    T: int = field(kw_only=True)
    slice_tokens: int = field(default=32 * _K, kw_only=True)

    @property
    def shape(self) -> dict[str, int | str]:
        return {**super().shape, "T": self.T}


def _prefill(model: str, tokens: int, past: int, *, slice_tokens: int = 32 * _K, suffix: str = "") -> PrefillCase:
    name = f"{model}-{tokens // _K}k-{past // _K}k{suffix}"
    return PrefillCase(name, 1, past + tokens, *_LATENTS[model], T=tokens, slice_tokens=slice_tokens)


# A chunk of 64K tokens over 1M before it is the bar's; the smaller one is for a quick look.
MLA_PREFILL = [
    _prefill(model, tokens, past)
    for tokens, past in ((16 * _K, 256 * _K), (64 * _K, 1024 * _K))
    for model in ("hylo-1b", "hylo-3b")
]

# What the size of a slice does. Run by name only.
MLA_PREFILL_SLICES = [
    _prefill(model, 16 * _K, 256 * _K, slice_tokens=n * _K, suffix=f"-slices-{n}k")
    for model in ("hylo-1b", "hylo-3b")
    for n in (8, 16, 64, 128)
]


@dataclass(frozen=True)
class AttentionCase:
    """Causal attention of a sequence to itself: q [B, T, H, K], k [B, T, HK, K], v [B, T, HK, V]."""

    name: str
    B: int
    T: int
    H: int
    HK: int
    K: int
    V: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {letter: getattr(self, letter) for letter in ("B", "T", "H", "HK", "K", "V")}


def _attention(model: str, tokens: int) -> AttentionCase:
    """The expanded heads of a model's latents."""
    heads, _, rope, nope, value = _LATENTS[model]
    return AttentionCase(f"{model}-{tokens // _K}k", 1, tokens, heads, LatentCase.HK, nope + rope, value)


MLA_ATTENTION = [_attention(model, n * _K) for n in (8, 64) for model in ("hylo-1b", "hylo-3b")]
# Other widths: one for keys and one for values, and heads that share nothing. Run by name only.
MLA_ATTENTION_OTHER = [
    _attention("qwen", 8 * _K),
    AttentionCase("minicpm-8k", 1, 8 * _K, 40, 40, 96, 64),
    AttentionCase("deepseek-h16-8k", 1, 8 * _K, 16, 16, 192, 128),
]


@dataclass(frozen=True)
class RowNormCase:
    """T rows of D numbers, normed to `dtype` by a weight in fp32; x has `dtype` too, if none of its own."""

    name: str
    T: int
    D: int
    dtype: torch.dtype = torch.bfloat16
    x_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    passes: tuple[str, ...] = ("forward", "forward_backward")

    @property
    def shape(self) -> dict[str, int]:
        return {"T": self.T, "D": self.D}


# A training step of 4 x 8192 tokens: the stream in fp32, x the bf16 result of a product. Qwen3 norms its heads.
RMS_NORM = [
    RowNormCase("1b-32k-residual", 32 * _K, 2048, residual_dtype=torch.float32),
    RowNormCase("1b-32k-fp32", 32 * _K, 2048, x_dtype=torch.float32),
    RowNormCase("1b-32k", 32 * _K, 2048),
    RowNormCase("3b-32k-residual", 32 * _K, 3072, residual_dtype=torch.float32),
    RowNormCase("8b-8k-residual-bf16", 8 * _K, 4096, residual_dtype=torch.bfloat16),
    RowNormCase("qwen-heads-8k", 8 * _K * 16, 128),
    RowNormCase("70b-8k-residual", 8 * _K, 8192, residual_dtype=torch.float32),
]


@dataclass(frozen=True)
class GateUpCase:
    """gate_up [T, 2 N]."""

    name: str
    T: int
    N: int
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = ("forward", "forward_backward")

    @property
    def shape(self) -> dict[str, int]:
        return {"T": self.T, "N": self.N}


# Llama 1B (3B has the same), Qwen3 1.7B, Llama 8B.
SWIGLU = [
    GateUpCase("1b-32k", 32 * _K, 8192),
    GateUpCase("1b-8k", 8 * _K, 8192),
    GateUpCase("qwen-8k", 8 * _K, 6144),
    GateUpCase("8b-8k", 8 * _K, 14336),
    GateUpCase("1b-8k-fp32", 8 * _K, 8192, torch.float32),
]


@dataclass(frozen=True)
class HeadsCase:
    """x [B, T, H, K], a slice of the channels of [B, T, channels]."""

    name: str
    B: int
    T: int
    H: int
    K: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = ("forward", "forward_backward")

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, "K": self.K, "channels": self.channels}


# Queries, keys of so many heads and values twice as wide.
L2_NORM = [
    HeadsCase("1b-32k", 4, 8 * _K, 6, 256, 4 * 6 * 256),
    HeadsCase("3b-32k", 4, 8 * _K, 9, 256, 4 * 9 * 256),
    HeadsCase("d128-8k", 1, 8 * _K, 16, 128, 4 * 16 * 128),
    HeadsCase("1b-8k-fp32", 1, 8 * _K, 6, 256, 4 * 6 * 256, torch.float32),
]


@dataclass(frozen=True)
class SkinnyCase:
    """x [B, K] times weights [N, K]; added to a residual [B, N], or of weights [2 N, K] with SwiGLU behind it.

    With a norm before it and SwiGLU or the convolution of the first `channels` outputs behind, it is a `linear_step`.
    """

    name: str
    B: int
    N: int
    K: int
    kind: str = "plain"
    channels: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "N": self.N, "K": self.K} | ({"D": self.channels} if self.channels else {})

    @property
    def has_norm(self) -> bool:
        return self.kind.startswith("norm")

    @property
    def rows(self) -> int:
        """Of the weights."""
        return 2 * self.N if "swiglu" in self.kind else self.N


# N, K: what layers of Llama-4MLA12GDN (1B), 6MLA22M2 and 14MLA14GDN (3B) multiply by, packed as the engine has them.
_PRODUCTS: dict[str, tuple[Any, ...]] = {
    "1b-gdn-in": (9232, 2048),
    "1b-gdn-out": (2048, 3072, "add"),
    "1b-mla-down": (1504, 2048),
    "1b-mla-q": (2048, 1344),
    "1b-mla-out": (2048, 2048, "add"),
    "1b-mlp-up": (8192, 2048, "swiglu"),
    "1b-mlp-down": (2048, 8192, "add"),
    "1b-head": (_LLAMA_VOCABULARY, 2048),
    "3b-m2-in": (8216, 3072),
    "3b-m2-out": (3072, 3072, "add"),  # of MLA as well
    "3b-gdn-in": (13848, 3072),
    "3b-gdn-out": (3072, 4608, "add"),
    "3b-mla-down": (1728, 3072),
    "3b-mla-q": (3072, 1536),
    "3b-mlp-up": (8192, 3072, "swiglu"),
    "3b-mlp-down": (3072, 8192, "add"),
    "3b-head": (_LLAMA_VOCABULARY, 3072),
}
# The same with what a step has before and behind them.
_PRODUCTS |= {
    "1b-gdn-in-step": (9232, 2048, "norm conv", 6144),
    "1b-mlp-up-step": (8192, 2048, "norm swiglu"),
    "1b-head-step": (_LLAMA_VOCABULARY, 2048, "norm"),
    "3b-m2-in-step": (8216, 3072, "norm"),
    "3b-mlp-up-step": (8192, 3072, "norm swiglu"),
}
SKINNY_LINEAR = [SkinnyCase(f"{name}-{B}", B, *product) for name, product in _PRODUCTS.items() for B in (1, 16, 64)]


@dataclass(frozen=True)
class SamplingCase:
    """logits [B, V] -> tokens [B]; the likeliest at temperature 0, else drawn from what top_k and top_p leave."""

    name: str
    B: int
    V: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> dict[str, int]:
        return {"B": self.B, "V": self.V}


_CHOICES: dict[str, tuple[Any, ...]] = {
    "greedy": (),
    "temperature": (0.7,),
    "top-k": (0.7, 50),
    "top-p": (0.7, None, 0.9),
    "top-k-top-p": (0.7, 50, 0.9),
}
SAMPLING = [
    SamplingCase(f"{name}-{B}", B, _LLAMA_VOCABULARY, *_CHOICES[name]) for name in _CHOICES for B in (1, 16, 64)
]
