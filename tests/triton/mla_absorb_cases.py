"""Cases of absorbed attention that every backend for GPUs runs: plain data, and the tensors made of it."""

import dataclasses
from dataclasses import dataclass

import torch

from hylo_ops import dequantize_kv_cache, fp8_row_parts, quantize_kv_cache
from hylo_ops.testing import cast

_NOTHING = 255  # the byte of which NaN is made, in e4m3 and in all that has more bits


@dataclass(frozen=True)
class Case:
    """Sizes are the op's; `lengths` and `starts` are those of the sequences, `spare` tokens of cache follow the last.

    Args:
        page: tokens of a page; None for a contiguous cache.
        HK: heads of the key scales, columns of the cache's rows; None for no scales.
        pad: columns of a row that nothing reads, NaN.
        fp8: whether the rows are quantized.
    """

    lengths: tuple[int, ...]
    T: int = 1
    H: int = 4
    R: int = 32
    E: int = 16
    page: int | None = None
    HK: int | None = None
    starts: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    fixed_split: bool = False
    spare: int = 0
    pad: int = 0
    fp8: bool = False

    def __str__(self) -> str:
        name = f"T{self.T}-H{self.H}-R{self.R}-E{self.E}-{'_'.join(map(str, self.lengths))}"
        name += "" if self.page is None else f"-page{self.page}"
        name += "" if self.HK is None else f"-scales{self.HK}"
        name += "" if self.starts is None else "-starts"
        name += "" if self.causal else "-full"
        name += "-fixed" if self.fixed_split else ""
        name += "-fp8" if self.fp8 else ""
        return f"{name}-{str(self.dtype).removeprefix('torch.')}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Small enough for an interpreter.
SMALL = [
    Case((70, 0, 33), dtype=FP32),
    Case((70, 0, 33), page=16, HK=2),
    Case((130, 7), T=3, H=3, E=0, page=32, spare=40),
    Case((130, 1, 65), T=2, H=6, R=96, E=32, page=64, HK=3, starts=(5, 0, 64), dtype=FP16),
    Case((300,), T=5, H=8, R=160, E=64, page=256, pad=3, dtype=FP16),
    Case((90, 2), T=4, H=2, R=16, causal=False, HK=1, dtype=FP32),
    Case((48, 31, 5), T=2, H=17, R=48, E=48, page=3, starts=(47, 40, 0)),
    Case((2, 64, 0, 33), T=8, H=4, page=24),
    Case((530, 40), R=128, E=32, H=32, page=16, fixed_split=True),
    Case((700, 65), R=64, H=9, fixed_split=True, dtype=FP32, starts=(90, 0)),
]

# The same for rows in fp8: R within one group of latents and over several, the last one whole or not.
SMALL_FP8 = [
    Case((70, 0, 33), fp8=True),
    Case((70, 0, 33), page=16, HK=2, fp8=True, dtype=FP16),
    Case((130, 7), T=3, H=3, E=0, page=32, spare=40, fp8=True),
    Case((130, 1, 65), T=2, H=6, R=160, E=32, page=64, HK=3, starts=(5, 0, 64), fp8=True, dtype=FP16),
    Case((100,), T=2, H=8, R=256, E=64, page=256, pad=40, fp8=True),
    Case((48, 31, 5), T=2, H=17, R=48, E=48, page=3, starts=(47, 40, 0), fp8=True),
    Case((530, 40), R=128, E=32, H=32, page=16, fixed_split=True, fp8=True),
    Case((90, 2), T=4, H=2, R=512, E=64, causal=False, HK=1, fp8=True),
]

# The dims of models, of every kind that a backend has a kernel for.
MODELS = [
    Case((4096,), H=32, R=128, E=32, page=64),
    Case((4096, 1, 0, 977, 64, 131), H=32, R=128, E=32, page=16, HK=8),
    Case((1500, 700, 3), T=3, H=24, R=128, E=64, page=64),
    Case((5000, 129), H=16, R=256, E=64, page=128, dtype=FP16),
    Case((2000, 130, 1), T=2, H=32, R=256, E=32, page=64, starts=(700, 0, 0)),
    Case((4100, 600), H=16, R=512, E=64, page=64),
    Case((1000, 300), H=128, R=512, E=64, page=64),
    Case((800, 90), T=4, H=32, R=160, E=64, page=32),
    Case((800, 90), T=8, H=32, R=64, E=32),
    Case((700, 200), H=32, R=480, E=32, page=256),
    Case((700, 200), H=9, R=16, E=32, page=64),
    Case((700, 200), H=15, R=48, E=32, causal=False),
    Case((700, 200), H=24, R=96, E=64, page=48),
    Case((700, 200), T=2, H=8, R=576, E=0, page=64, dtype=FP16),
    Case((1300, 200), H=32, R=128, E=32, page=64, dtype=FP32),
    Case((600, 200), H=16, R=512, E=64, page=64, dtype=FP32),
    Case((9000, 513, 512), H=32, R=128, E=32, page=64, fixed_split=True),
]
MODELS_FP8 = [dataclasses.replace(case, fp8=True) for case in MODELS if case.dtype != FP32]


def make(case: Case, seed: int = 0) -> dict:
    """The op's tensors by name. Whatever no position reaches is NaN, or garbage in the table."""
    rng = torch.Generator().manual_seed(seed)
    batch, width = len(case.lengths), case.R + case.E + (case.HK or 0)
    size = max(case.lengths) + case.spare
    cache = torch.randn(batch, size, width + case.pad, generator=rng)
    cache[..., width:] = torch.nan
    cache[..., case.R + case.E : width] = cache[..., case.R + case.E : width].abs() + 0.5
    for n, length in enumerate(case.lengths):
        cache[n, length:] = torch.nan
        cache[n, : case.starts[n] if case.starts else 0] = torch.nan
    cache, table = _as_stored(cache, case), None
    if case.page is not None:
        cache, table = _into_pages(cache, case, rng)
    return {
        "q_nope": torch.randn(batch, case.T, case.H, case.R, generator=rng).to(case.dtype),
        "q_rope": torch.randn(batch, case.T, case.H, case.E, generator=rng).to(case.dtype),
        "kv_cache": cache,
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32),
        "cache_starts": None if case.starts is None else torch.tensor(case.starts, dtype=torch.int32),
        "block_table": table,
        "key_scale": None if case.HK is None else key_scales(cache, case),
        "scale": (case.R // 2 + case.E) ** -0.5,
    }


def key_scales(cache: torch.Tensor, case: Case) -> torch.Tensor:
    """The view of them in rows of the case."""
    if case.fp8:
        _, _, rest = fp8_row_parts(cache, latent_rank=case.R, dtype=case.dtype)
        return rest[..., case.E : case.E + case.HK]
    return cache[..., case.R + case.E : case.R + case.E + case.HK]


def dequantized(inputs: dict, case: Case, dtype: torch.dtype) -> dict:
    """The same over a cache of rows of what those in fp8 stand for, in a dtype that all floating tensors get."""
    if not case.fp8:
        return cast(inputs, dtype)
    parts = {"latent_rank": case.R, "width": case.R + case.E, "dtype": case.dtype}
    return cast(inputs, dtype) | {"kv_cache": dequantize_kv_cache(inputs["kv_cache"], **parts, out_dtype=dtype)}


def _as_stored(cache: torch.Tensor, case: Case) -> torch.Tensor:
    """In fp8 rows of NaN, and what lies behind rows, are `_NOTHING`."""
    if not case.fp8:
        return cache.to(case.dtype)
    width = case.R + case.E + (case.HK or 0)
    rows = quantize_kv_cache(cache[..., :width], latent_rank=case.R, dtype=case.dtype)
    rows = torch.nn.functional.pad(rows, (0, -case.pad // 16 * -16), value=_NOTHING)
    rows[cache[..., 0].isnan()] = _NOTHING
    return rows


def _into_pages(cache: torch.Tensor, case: Case, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    batch, size, row = cache.shape
    page, each = case.page, -(-size // case.page)
    order = torch.randperm(batch * each + 2, generator=rng)[: batch * each]
    unused = _NOTHING if case.fp8 else torch.nan
    pool = torch.full((batch * each + 2, page, row), unused, dtype=cache.dtype)
    pool[order] = torch.nn.functional.pad(cache, (0, 0, 0, each * page - size), value=unused).view(-1, page, row)
    table = order.view(batch, each).to(torch.int32)
    for n, length in enumerate(case.lengths):
        table[n, -(-length // page) :] = 2**31 - 1
        table[n, : (case.starts[n] if case.starts else 0) // page] = -5
    return pool, table
