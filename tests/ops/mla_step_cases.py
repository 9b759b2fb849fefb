"""Cases of the decode step of latent attention in 16 bits, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hylo_ops.fused import mla, mla_step
from hylo_ops.testing import DTYPE_NAMES, cast, within_budget

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSORS = ("q_nope", "q_rope", "kv_new", "w_uk", "w_uv", "kv_cache", "cache_seqlens", "position", "cos", "sin")
OPTIONAL = ("cache_starts", "block_table")
SCALE = 0.2

Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Sequences of some lengths, the new token included, in a contiguous cache or in pages; NaN where none may look.

    scales: columns of key scales. padding: sequences that are padding. angles: dtype of cos and sin, `shared` by all
    sequences or not. spare: columns of a row that nothing reads, beside those that round it up to 16 bytes.
    """

    H: int
    HK: int
    nope: int
    R: int
    E: int
    v: int
    lengths: tuple[int, ...] = (70, 1, 5, 129)
    page: int | None = 16
    scales: int = 0
    padding: tuple[int, ...] = ()
    starts: tuple[int, ...] | None = None
    dtype: torch.dtype = BF16
    angles: torch.dtype = BF16
    shared: bool = False
    integers: torch.dtype = torch.int32
    spare: int = 0

    @property
    def name(self) -> str:
        parts = [f"H{self.H}-HK{self.HK}-{self.nope}-{self.R}+{self.E}-{self.v}", f"B{len(self.lengths)}"]
        parts += [f"S{max(self.lengths)}", DTYPE_NAMES[self.dtype]]
        for field in fields(self)[7:]:
            value = getattr(self, field.name)
            if value != field.default and field.name != "dtype":
                parts.append(f"{field.name}{value}".replace(" ", "").replace("torch.", ""))
        return "-".join(parts)

    @property
    def row(self) -> int:
        """Columns of the cache, a multiple of 8."""
        return (self.R + self.E + self.scales + self.spare + 7) // 8 * 8

    def inputs(self, device: str) -> dict[str, Any]:
        """Keyword arguments of the op, but for scale; queries and weights are views, as a model has them."""
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        B, keys = len(self.lengths), self.R + self.E
        q = normal(B, 1, self.H, self.nope + self.E).to(self.dtype).to(device)
        up = (normal(self.HK, self.nope + self.v, self.R) * 0.2).to(self.dtype).to(device)
        kv_new = normal(B, 1, self.row)
        kv_new[..., keys:] = 0.5 + kv_new[..., keys:].abs()
        cache = normal(B, max(self.lengths), self.row)
        cache[..., keys:] = 0.5 + cache[..., keys:].abs()
        cache[..., keys + self.scales :] = torch.nan
        position = [-1 if n in self.padding else length - 1 for n, length in enumerate(self.lengths)]
        for n, last in enumerate(position):
            cache[n, max(last, 0) :] = torch.nan
            cache[n, : self.starts[n] if self.starts else 0] = torch.nan
        for n in self.padding:
            q[n] = torch.nan
        cache, table = self._into_pages(cache.to(self.dtype))
        angle = normal(1 if self.shared else B, 1, self.E // 2).repeat(1, 1, 2)
        integers = partial(torch.tensor, dtype=self.integers, device=device)
        return {
            "q_nope": q[..., : self.nope],
            "q_rope": q[..., self.nope :],
            "kv_new": kv_new.to(self.dtype).to(device),
            "w_uk": up[:, : self.nope],
            "w_uv": up[:, self.nope :],
            "kv_cache": cache.to(device),
            "cache_seqlens": integers(self.lengths),
            "position": integers(position),
            "cos": (1.2 * angle.cos()).to(self.angles).to(device),
            "sin": (1.2 * angle.sin()).to(self.angles).to(device),
            "cache_starts": integers(self.starts) if self.starts else None,
            "block_table": None if table is None else table.to(self.integers).to(device),
            "key_scale": self.scales or None,
        }

    def _into_pages(self, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pages in a random order, two to spare; entries of the table that nobody may follow lead out of the cache."""
        if self.page is None:
            return cache, None
        B, size, row = cache.shape
        each = -(-size // self.page)
        order = torch.randperm(B * each + 2, generator=torch.Generator().manual_seed(1))[: B * each]
        pool = torch.full((B * each + 2, self.page, row), torch.nan, dtype=cache.dtype)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, each * self.page - size), value=torch.nan)
        pool[order] = padded.reshape(-1, self.page, row)
        table = order.view(B, each).clone()
        for n, length in enumerate(self.lengths):
            table[n, -(-length // self.page) :] = 2**31 - 1
            if n in self.padding:
                table[n] = -1
        return pool, table


def arguments(x: dict[str, Any]) -> tuple[Any, ...]:
    """As the native module takes them, but for scale and key_scale."""
    return tuple(x[name] for name in (*TENSORS, *OPTIONAL))


def composed(x: dict[str, Any]) -> Tensor:
    """What rounds after each op, on any device."""
    return mla._composed(*arguments(x), SCALE, x["key_scale"])


def by_op(x: dict[str, Any], backend: str = "cuda") -> Tensor:
    return mla_step(**x, scale=SCALE, backend=backend)


by_triton = partial(by_op, backend="triton")


def run_and_check(case: Case, device: str, step: Step = by_op) -> None:
    """Twice the same bits, as near to float64 as the composition, and nothing written but the new rows."""
    x = case.inputs(device)
    before = x["kv_cache"].clone()
    o = step(x)
    after = x["kv_cache"].clone()
    x["kv_cache"].copy_(before)
    assert torch.equal(step(x), o), "o differs from run to run"
    assert same_bits(x["kv_cache"], after), "the cache differs from run to run"
    check(case, x | {"kv_cache": before}, o, after)


def check(case: Case, x: dict[str, Any], o: Tensor, after: Tensor) -> None:
    """x as it was before the step."""
    eager, exact = x | {"kv_cache": x["kv_cache"].clone()}, cast(x, torch.float64)
    o_eager, o_exact = composed(eager), mla_step(**exact, scale=SCALE, backend="reference")
    assert (o.dtype, tuple(o.shape), o.is_contiguous()) == (case.dtype, o_exact.shape, True)
    within_budget(o, o_eager, o_exact, "o")
    for n in case.padding:
        assert not o[n].any(), "padding gives zeros"
    written = ~same_rows(x["kv_cache"], after)
    assert int(written.sum()) == len(case.lengths) - len(case.padding), "rows written"
    assert torch.equal(written, ~same_rows(x["kv_cache"].double(), exact["kv_cache"])), "where"
    within_budget(after[written], eager["kv_cache"][written], exact["kv_cache"][written], "rows")
    rest = case.R + case.E
    assert same_bits(after[written][:, rest:], exact["kv_cache"][written][:, rest:].to(case.dtype)), "the rest of a row"


def same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(same_rows(one, other).all())


def same_rows(one: Tensor, other: Tensor) -> Tensor:
    """Of which rows all numbers are equal or both NaN."""
    return ((one == other) | (one.isnan() & other.isnan())).all(-1)


# Of two kinds of kernels, so that they compile in seconds for the CPU.
EMULATED = [
    Case(6, 2, 32, 80, 32, 48, padding=(1,), angles=FP32),
    Case(6, 2, 32, 80, 32, 48, page=None, starts=(9, 0, 4, 70), shared=True, integers=torch.int64, spare=3),
    Case(4, 4, 16, 16, 0, 16, (20, 3), page=8, scales=4, dtype=FP16),
    Case(4, 1, 16, 16, 0, 32, (0, 9), page=None, scales=2, padding=(0,), dtype=FP16),
    # at the end of a cache so long that dividing by its length as by a page's is no longer exact
    Case(4, 1, 16, 16, 0, 32, (65537,), page=None, scales=2, starts=(65520,), dtype=FP16),
]
