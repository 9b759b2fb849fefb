"""Cases of the decode step's CUDA backend, plain and with its activations inside, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops import fused, recurrent_gated_delta_rule
from hylo_ops.testing import DTYPE_NAMES, cast, within_budget

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """G and H heads, widths K and V; `raw` has the activations inside; `index` the dtype of a pool's indices."""

    K: int
    V: int
    dtype: torch.dtype = BF16
    state_dtype: torch.dtype = FP32
    raw: bool = False
    B: int = 3
    G: int = 2
    H: int = 4
    gate_dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    index: torch.dtype | None = torch.int32
    strided: bool = False
    qk_l2norm: bool = True
    allow_neg_eigval: bool = False

    @property
    def name(self) -> str:
        parts = [f"B{self.B}-G{self.G}-H{self.H}-K{self.K}-V{self.V}", DTYPE_NAMES[self.dtype]]
        parts += [f"state-{DTYPE_NAMES[self.state_dtype]}", *(DTYPE_NAMES[d] for d in self.gate_dtypes)]
        parts += ["raw"] * self.raw + ["strided"] * self.strided + ["neg"] * self.allow_neg_eigval
        parts += ["unnormed"] * (self.raw and not self.qk_l2norm)
        return "-".join(parts + ([] if self.index is None else [str(self.index).removeprefix("torch.")]))

    @property
    def defines(self) -> tuple[tuple[str, int | str], ...]:
        """Of its kernel."""
        types = (("T", DTYPE_NAMES[self.dtype]), ("S", DTYPE_NAMES[self.state_dtype]))
        return (*types, ("K", self.K), ("RAW", int(self.raw)), ("TEAM", 64))  # of few states, as these are

    def inputs(self, device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        B, G, H, K, V = self.B, self.G, self.H, self.K, self.V
        q, k = normal(B, 1, G, K), normal(B, 1, G, K)
        if not self.raw or not self.qk_l2norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        tensors = {"q": q.to(self.dtype), "k": k.to(self.dtype), "v": normal(B, 1, H, V).to(self.dtype)}
        first, second = self.gate_dtypes
        if self.raw:
            tensors |= {"a": normal(B, 1, H).to(first), "b": normal(B, 1, H).to(second)}
            tensors |= {"A_log": normal(H).to(first), "dt_bias": (normal(H) - 3).to(second)}
        else:
            tensors |= {"g": F.logsigmoid(normal(B, 1, H) + 3).to(first), "beta": normal(B, 1, H).sigmoid().to(second)}
        rows = B if self.index is None else B + 2
        tensors["state"] = (normal(rows, H, K, V) * K**-0.5).to(self.state_dtype)
        tensors = {name: t.to(device) for name, t in tensors.items()}
        if self.strided:
            tensors = {name: every_second(t) for name, t in tensors.items()}
        options: dict[str, Any] = {"scale": 0.3}
        if self.index is not None:
            order = torch.tensor([B + 1, -1, *range(B - 2)][:B], dtype=self.index)
            options["state_indices"] = order.to(device)
        if self.raw:
            options |= {"qk_l2norm": self.qk_l2norm, "allow_neg_eigval": self.allow_neg_eigval}
        return tensors | options


def every_second(t: Tensor) -> Tensor:
    """The same values as every second entry of the batch and, where there is one, of the heads."""
    wide = torch.stack([t, torch.full_like(t, torch.nan)], dim=1 if t.ndim > 1 else -1)
    return wide[:, 0] if t.ndim > 1 else wide[..., 0]


def run_and_check(case: Case, device: str, **options: Any) -> None:
    """The public function on the CUDA backend: o and state within twice the reference's error, padding untouched; with
    activations inside, the same bits of a settled state."""
    function = fused.gated_delta_rule_step if case.raw else recurrent_gated_delta_rule
    inputs = case.inputs(device)
    before = inputs["state"].clone()
    states = {name: before.clone() for name in ("eager", "exact", "settled")}
    o = function(**inputs, backend="cuda", **options)
    o_eager = function(**(inputs | {"state": states["eager"]}), backend="reference")
    wide = cast(inputs, FP64)
    states["exact"] = before.double()
    o_exact = function(**(wide | {"state": states["exact"]}), backend="reference")
    assert (o.dtype, o.shape, o.is_contiguous()) == (case.dtype, inputs["v"].shape, True)
    if case.index is not None:
        assert not o[1].any()
        used = inputs["state_indices"][inputs["state_indices"] >= 0].long()
        idle = torch.ones(len(before), dtype=torch.bool, device=device).index_fill(0, used, False)
        assert torch.equal(inputs["state"][idle], before[idle])
    within_budget(o, o_eager, o_exact, "o")
    within_budget(inputs["state"], states["eager"], states["exact"], "state")
    if case.raw:  # on a GPU, ordinary kernels have run since that state was made
        settled = inputs | {"state": states["settled"]}
        assert torch.equal(function(**settled, settled_state=True, backend="cuda", **options), o)
        assert torch.equal(states["settled"], inputs["state"])


CASES = [
    Case(16, 16, FP32, gate_dtypes=(FP32, FP64), B=2, index=torch.int64),
    Case(48, 80, gate_dtypes=(BF16, FP32)),
    Case(48, 80, strided=True, index=None),
    Case(48, 16, strided=True),
    Case(112, 48, FP16, BF16, gate_dtypes=(FP16, FP16)),
    Case(112, 16, FP16, BF16, H=2, index=None, strided=True),
    Case(256, 48, raw=True, gate_dtypes=(BF16, FP32), H=6),
    Case(256, 48, raw=True, qk_l2norm=False, allow_neg_eigval=True, index=torch.int64),
    Case(80, 32, FP16, BF16, raw=True, gate_dtypes=(FP32, FP16), strided=True),
    Case(80, 32, FP16, BF16, raw=True, G=1, index=None),
]
