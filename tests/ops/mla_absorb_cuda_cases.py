"""Cases of absorbed latent attention in 16 bits, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bench.shapes import MLA_ABSORB, MLA_ABSORB_FP8, MLA_ABSORB_LARGE, LatentCase
from hylo_ops import dequantize_kv_cache, fp8_row_parts, quantize_kv_cache
from hylo_ops.mla_absorb import reference
from hylo_ops.testing import DTYPE_NAMES, cast, within_budget

BF16, FP16 = torch.bfloat16, torch.float16
NAMES = ("q_nope", "q_rope", "kv_cache", "cache_seqlens", "cache_starts", "block_table", "key_scale")
SCALE = 0.1
NO_BYTE = 255  # of it alone NaN is made, in e4m3 and in all that has more bits

Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Sequences of some lengths in a contiguous cache, or in pages; NaN wherever nothing may look.

    HK: heads of the key scales, which stand behind the keys in the cache; none if 0. spread: as the CUDA backend has
    it. fp8: whether the rows of the cache are.
    """

    R: int
    E: int
    H: int
    lengths: tuple[int, ...] = (500, 3, 0, 129)
    T: int = 1
    page: int | None = 64
    HK: int = 0
    starts: tuple[int, ...] | None = None
    dtype: torch.dtype = BF16
    integers: torch.dtype = torch.int32
    causal: bool = True
    fixed_split: bool = False
    spread: tuple[int, int] | None = None
    fp8: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.R}+{self.E}-H{self.H}", f"B{len(self.lengths)}-S{max(self.lengths)}", DTYPE_NAMES[self.dtype]]
        for field in fields(self)[4:]:
            value = getattr(self, field.name)
            if value != field.default and field.name != "dtype":
                parts.append(f"{field.name}{value}".replace(" ", "").replace("torch.", ""))
        return "-".join(parts)

    def inputs(self, device: str) -> dict[str, Tensor | None]:
        g = torch.Generator().manual_seed(0)
        B, keys = len(self.lengths), self.R + self.E
        cache = torch.randn(B, max(*self.lengths, 1), keys + (self.HK + 7) // 8 * 8, generator=g)
        cache[..., keys:] = 0.5 + cache[..., keys:].abs()
        cache[..., keys + self.HK :] = torch.nan  # rows are a multiple of 16 bytes
        for n, length in enumerate(self.lengths):
            cache[n, length:] = torch.nan
            cache[n, : self.starts[n] if self.starts else 0] = torch.nan
        cache, table = self._in_fp8(cache) if self.fp8 else cache.to(self.dtype), None
        if self.page is not None:
            cache, table = self._into_pages(cache, self.page, g)
        q = torch.randn(B, self.T, self.H, keys, generator=g).to(self.dtype)
        cache = cache.to(device)
        behind = fp8_row_parts(cache, latent_rank=self.R, dtype=self.dtype)[2] if self.fp8 else cache[..., self.R :]
        return {
            "q_nope": q[..., : self.R].to(device),
            "q_rope": q[..., self.R :].to(device),
            "kv_cache": cache,
            "cache_seqlens": torch.tensor(self.lengths, dtype=self.integers, device=device),
            "cache_starts": torch.tensor(self.starts, dtype=self.integers, device=device) if self.starts else None,
            "block_table": None if table is None else table.to(self.integers).to(device),
            "key_scale": behind[..., self.E : self.E + self.HK] if self.HK else None,
        }

    def _in_fp8(self, cache: Tensor) -> Tensor:
        """Bytes of NaN for all that is not a number of a token: between the parts of rows, and behind some of them."""
        width = self.R + self.E + self.HK
        rows = quantize_kv_cache(cache[..., :width], latent_rank=self.R, dtype=self.dtype)
        rows = torch.nn.functional.pad(rows, (0, 16 if self.HK else 0))
        numbers = fp8_row_parts(rows, latent_rank=self.R, dtype=self.dtype)
        made = torch.full_like(rows, NO_BYTE)
        parts = fp8_row_parts(made, latent_rank=self.R, dtype=self.dtype)
        for part, of, size in zip(parts, numbers, (None, None, width - self.R), strict=True):
            part[..., :size].copy_(of[..., :size])
        made[cache[..., 0].isnan()] = NO_BYTE
        return made

    def _into_pages(self, cache: Tensor, page: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pages in a random order, two to spare; entries of the table that nobody may follow lead out of the cache."""
        B, size, row = cache.shape
        each = -(-size // page)
        order = torch.randperm(B * each + 2, generator=g)[: B * each]
        nothing = NO_BYTE if self.fp8 else torch.nan
        pool = torch.full((B * each + 2, page, row), nothing, dtype=cache.dtype)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, each * page - size), value=nothing)
        pool[order] = padded.reshape(-1, page, row)
        table = order.view(B, each).clone()
        for n, length in enumerate(self.lengths):
            table[n, -(-length // page) :] = 2**31 - 1
            table[n, : self.starts[n] // page if self.starts else 0] = -5
        return pool, table


def run_and_check(case: Case, device: str, attend: Attend) -> None:
    """Twice: the same bits, and as near to float64 as the definition in the same dtype."""
    x = case.inputs(device)
    o, lse = attend(x, case)
    again = attend(x, case)
    assert torch.equal(o, again[0]), "o differs from run to run"
    assert torch.equal(lse, again[1]), "lse differs from run to run"
    check(x, case, o, lse)
    if case.fixed_split:
        check_each_alone(x, case, o, lse, attend)


def check(x: dict[str, Any], case: Case, o: Tensor, lse: Tensor) -> None:
    """Of rows in fp8 a backend may round what they stand for to 16 bits."""
    eager_o, _ = by_steps(x, case)
    exact_o, exact_lse = by_steps(cast(x, torch.float64), case)
    rounded_lse = by_steps(cast(in_16_bits(x, case), torch.float64), case)[1] if case.fp8 else exact_lse
    within_budget(o, eager_o, exact_o, "o")
    blind = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, blind), "which tokens see nothing"
    assert not o[blind].any(), "zeros where a token sees nothing"
    allowed = 1e-3 + (rounded_lse - exact_lse)[~blind].abs()
    assert ((lse.double() - exact_lse)[~blind].abs() <= allowed).all(), "lse"


def by_steps(x: dict[str, Any], case: Case) -> tuple[Tensor, Tensor]:
    x = in_16_bits(x, case, x["q_nope"].dtype)
    return reference.step_by_step(*(x[name] for name in NAMES), SCALE, case.causal)


def in_16_bits(x: dict[str, Any], case: Case, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What rows in fp8 stand for, rounded to 16 bits or to another dtype; other inputs as they are."""
    if x["kv_cache"].dtype != torch.uint8:
        return x
    sizes = {"latent_rank": case.R, "width": case.R + case.E, "dtype": case.dtype}
    return x | {"kv_cache": dequantize_kv_cache(x["kv_cache"], **sizes, out_dtype=dtype or case.dtype)}


def check_each_alone(x: dict[str, Any], case: Case, o: Tensor, lse: Tensor, attend: Attend) -> None:
    for n in range(len(case.lengths)):
        one = {k: v if v is None else v[n : n + 1] for k, v in x.items()}
        if case.page is not None:
            one |= {"kv_cache": x["kv_cache"], "key_scale": x["key_scale"]}
        alone, lse_alone = attend(one, case)
        assert torch.equal(alone, o[n : n + 1]), f"sequence {n} differs beside others"
        assert torch.equal(lse_alone, lse[n : n + 1]), f"lse of sequence {n} differs beside others"


LONG = (2500, 3, 0, 129, 4000)
MIXED = (500, 3, 0, 129, 700)
PADDED = (70, 0, 0, 129, 333)
# Of few kernels, so that they compile in seconds for the CPU.
EMULATED = [
    Case(48, 32, 7, MIXED, 3, page=16, starts=PADDED, dtype=FP16, integers=torch.int64, spread=(4, 3)),
    Case(48, 32, 24, (64, 65, 0, 1), page=48, dtype=FP16, spread=(2, 0)),
    Case(48, 32, 12, (64, 65, 2, 700), 2, page=None, dtype=FP16, causal=False),
    Case(48, 32, 17, (6200, 2200, 129), page=128, dtype=FP16, fixed_split=True),
    Case(256, 64, 16, (300, 64), page=32, HK=8, spread=(2, 1)),
    Case(256, 64, 12, (130,), page=None, HK=4, spread=(1, 2)),
    Case(16, 0, 40, (300, 65), 3, page=8, spread=(1, 1)),
    Case(16, 0, 64, tuple(37 * i % 150 for i in range(36)), page=16, spread=(1, 3)),
    Case(256, 32, 64, (500, 3, 0, 129), page=32, spread=(2, 3)),
    Case(256, 32, 37, (400, 65), 2, page=None, HK=1, spread=(1, 2)),
    Case(256, 32, 128, (300, 65), page=64, spread=(2, 2)),
    Case(512, 64, 128, (900,), spread=(4, 2)),
    Case(512, 64, 100, (200, 70), page=32, starts=(70, 0), spread=(2, 1)),
    Case(512, 64, 64, (300, 65), 2, page=None, spread=(1, 1)),
    # Whole sequences, more of them than clusters, too.
    Case(48, 32, 7, MIXED, 3, page=16, starts=PADDED, dtype=FP16, integers=torch.int64, spread=(4, 0)),
    Case(256, 32, 37, (400, 65), 2, page=None, HK=1, spread=(1, 0)),
    Case(512, 64, 64, (300, 65), 2, page=None, spread=(2, 0)),
    Case(48, 32, 7, MIXED, 3, page=16, starts=PADDED, dtype=FP16, integers=torch.int64, spread=(4, 0), fp8=True),
    # Rows in fp8: one group of latents, several, the last one whole or not; parts of tiles of 32, 16 and 8 rows.
    Case(48, 32, 7, MIXED, 3, page=16, starts=PADDED, dtype=FP16, integers=torch.int64, spread=(4, 3), fp8=True),
    Case(48, 32, 12, (64, 65, 2, 700), 2, page=None, dtype=FP16, causal=False, fp8=True),
    Case(48, 32, 17, (2200, 129), page=128, dtype=FP16, fixed_split=True, fp8=True),
    Case(144, 0, 5, tuple(37 * i % 150 for i in range(36)), page=8, HK=5, spread=(1, 3), fp8=True),
    Case(256, 64, 16, (300, 64), page=32, HK=8, spread=(2, 1), fp8=True),
    Case(512, 64, 16, (330, 65), page=64, spread=(2, 1), fp8=True),
    Case(512, 64, 12, (200, 3), page=8, spread=(1, 1), fp8=True),
    Case(512, 64, 24, (300, 0, 65), page=None, spread=(1, 1), fp8=True),
    # All tiles to one block, so that its stages are filled again and again.
    Case(48, 32, 7, (1100, 129), 3, page=16, dtype=FP16, integers=torch.int64, spread=(1, 32)),
    Case(256, 64, 16, (600,), page=32, HK=8, spread=(1, 16)),
    Case(512, 64, 128, (400,), spread=(1, 16)),
    Case(48, 32, 17, (1100, 129), page=128, dtype=FP16, spread=(1, 32), fp8=True),
    Case(512, 64, 24, (400, 65), page=None, spread=(1, 16), fp8=True),
]
# Of sequences that many blocks merge together where a GPU holds twelve clusters. Of the kernels above.
GATHERED = [
    Case(48, 32, 24, (1000, 65, 0, 1), page=48, dtype=FP16, spread=(1, 1)),
    Case(48, 32, 7, (65, 1500, 129, 700), 3, page=16, starts=(0, 200, 0, 0), dtype=FP16, spread=(2, 1)),
    Case(256, 64, 16, (600,), page=32, HK=8, spread=(1, 1)),
    Case(16, 0, 40, (700, 65), 3, page=8, spread=(1, 1)),
    Case(256, 32, 37, (65, 330), 2, page=None, HK=1, spread=(2, 1)),
    Case(512, 64, 128, (330,), spread=(1, 1)),
    Case(512, 64, 100, (70, 330, 65), page=32, starts=(70, 0, 1), spread=(1, 1)),
    Case(512, 64, 64, (65, 330), page=None, spread=(2, 1)),
    Case(512, 64, 24, (130, 0, 300), page=None, spread=(1, 1), fp8=True),
]
SPREADS = [(cluster, least) for cluster in (1, 2, 4, 8, 16) for least in sorted({0, 1, cluster, 5})]
CASES = [
    *EMULATED,
    *GATHERED,
    Case(128, 32, 32, (200,), page=None, spread=(1, 1)),
    *(Case(128, 32, 32, LONG, spread=spread) for spread in SPREADS),
    *(Case(128, 32, 32, LONG, page=page, dtype=FP16) for page in (None, 8, 16, 32, 48, 80, 128, 256)),
    *(Case(128, 64, H, LONG) for H in (1, 5, 8, 9, 24, 33, 40, 48, 64, 100, 128)),
    *(Case(128, 32, 8, LONG, T, causal=causal, starts=PADDED) for T in (2, 3, 8) for causal in (True, False)),
    *(Case(R, E, 16, LONG) for R in (16, 48, 64, 80, 96, 128, 160, 192, 256, 320, 480, 512, 576) for E in (0, 32, 64)),
    *(Case(R, 64, 16, LONG, HK=HK) for R in (64, 128, 256, 448) for HK in (1, 4, 16)),
    *(Case(512, 64, H, LONG, T) for H, T in ((16, 2), (32, 1))),
    # Query rows on the tensor core's rows.
    *(Case(512, 64, 128, LONG, spread=spread) for spread in (None, *SPREADS)),
    *(Case(512, 64, H, LONG, T, starts=PADDED) for H, T in ((16, 3), (40, 1), (64, 2), (100, 1), (128, 8))),
    *(Case(R, E, 64, LONG, page=16, dtype=FP16) for R in (256, 512) for E in (0, 32, 64)),
    *(Case(512, 32, 64, LONG, page=None, HK=HK) for HK in (1, 4, 16)),
    *(Case(256, 64, 64, LONG, T, HK=8, causal=causal) for T in (1, 3) for causal in (True, False)),
    *(Case(512, 64, 128, LONG, page=page, fixed_split=True) for page in (None, 64)),
    Case(512, 64, 128, tuple(37 * i % 150 for i in range(300)), page=16),
    *(
        Case(R, E, H, LONG, page=page, fixed_split=True)
        for R, E, H in ((128, 32, 32), (256, 64, 16))
        for page in (None, 64)
    ),
    Case(64, 32, 16, tuple(37 * i % 150 for i in range(300)), page=16),
    Case(64, 32, 16, tuple(37 * i % 150 for i in range(3000)), page=16, spread=(4, 7)),
    Case(128, 32, 32, (0, 0)),
    # Rows in fp8.
    *(Case(128, 32, 32, LONG, spread=spread, fp8=True) for spread in SPREADS),
    *(Case(128, 32, 32, LONG, page=page, dtype=FP16, fp8=True) for page in (None, 8, 16, 32, 48, 80, 128, 256)),
    *(Case(128, 64, H, LONG, fp8=True) for H in (1, 9, 24, 40, 64, 128)),
    *(Case(128, 32, 8, LONG, T, causal=causal, starts=PADDED, fp8=True) for T in (2, 8) for causal in (True, False)),
    *(
        Case(R, E, 16, LONG, fp8=True)
        for R in (16, 48, 64, 80, 96, 128, 144, 160, 192, 256, 320, 480, 512, 576)
        for E in (0, 32, 64)
    ),
    *(Case(R, 64, 16, LONG, HK=HK, fp8=True) for R in (64, 128, 256, 448) for HK in (1, 4, 16)),
    *(Case(512, 64, H, LONG, page=page, fp8=True) for H in (8, 16, 24, 128) for page in (None, 8, 64)),
    *(Case(512, 64, H, LONG, dtype=FP16, fixed_split=True, fp8=True) for H in (16, 128)),
    Case(64, 32, 16, tuple(37 * i % 150 for i in range(3000)), page=16, spread=(4, 7), fp8=True),
]

BENCHMARK = [*MLA_ABSORB, *MLA_ABSORB_FP8, *MLA_ABSORB_LARGE]


def with_one_page(case: LatentCase, device: str) -> dict[str, Any]:
    """Inputs of a benchmark's case, all of whose pages are the same one."""
    cache = torch.randn(1, case.page, case.R + case.E, dtype=case.dtype, device=device)
    q = torch.randn(case.B, 1, case.H, case.R + case.E, dtype=case.dtype, device=device)
    pages = -(-max(case.lengths) // case.page)
    return {
        "q_nope": q[..., : case.R],
        "q_rope": q[..., case.R :],
        "kv_cache": quantize_kv_cache(cache, latent_rank=case.R) if case.fp8 else cache,
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32, device=device),
        "cache_starts": None,
        "block_table": torch.zeros(case.B, pages, dtype=torch.int32, device=device),
        "key_scale": None,
    }
