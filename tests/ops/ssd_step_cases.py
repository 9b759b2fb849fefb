"""Cases of the CUDA decode steps of the SSD scan and of a whole Mamba2 block, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hylo_ops import fused, recurrent_ssd
from hylo_ops.testing import DTYPE_NAMES, cast, within_budget

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """H heads, those of x, b and c in `shared`, widths K and V; `index` is the dtype of a pool's indices.

    gate_dtypes: of dt, a, dt_bias and d; None leaves the last two out.
    """

    K: int
    V: int
    dtype: torch.dtype = BF16
    state_dtype: torch.dtype = FP32
    B: int = 3
    H: int = 4
    shared: tuple[int, int, int] = (2, 2, 4)
    gate_dtypes: tuple[torch.dtype | None, ...] = (BF16, FP32, FP32, FP32)
    softplus: bool = True
    dt_limit: tuple[float, float] | None = None
    index: torch.dtype | None = torch.int32
    strided: bool = False

    @property
    def name(self) -> str:
        return "-".join([*self._parts(), *_tail(self)])

    def _parts(self) -> list[str]:
        heads = "H{}-HX{}-GB{}-G{}".format(self.H, *self.shared)
        parts = [f"B{self.B}-{heads}-K{self.K}-V{self.V}", DTYPE_NAMES[self.dtype]]
        return [*parts, f"state-{DTYPE_NAMES[self.state_dtype]}"]

    def function(self) -> Callable[..., Tensor]:
        return recurrent_ssd

    def inputs(self, device: str) -> dict[str, Any]:
        """Keyword arguments of the function."""
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        B, H, K, V = self.B, self.H, self.K, self.V
        HX, GB, G = self.shared
        tensors = {
            "x": normal(B, 1, HX, V).to(self.dtype),
            "b": normal(B, 1, GB, K).to(self.dtype),
            "c": normal(B, 1, G, K).to(self.dtype),
            "state": normal(_rows(self), H, V, K).to(self.state_dtype),
            **_gates(self, normal),
        }
        return _placed(self, tensors, device) | _options(self, device)

    def tensors(self, x: dict[str, Any]) -> tuple[Any, ...]:
        """As the native module takes them."""
        names = ("x", "dt", "a", "b", "c", "state", "d", "dt_bias", "state_indices")
        return tuple(x.get(name) for name in names)


@dataclass(frozen=True)
class Mamba2Case(Case):
    """The same of a whole block, with `norms` NG and a convolution of width W; `conv_dtype` of its state."""

    norms: int = 1
    W: int = 4
    conv_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    conv_bias: bool = True
    norm_before_gate: bool = False

    @property
    def name(self) -> str:
        parts = [*self._parts(), f"NG{self.norms}-W{self.W}"]
        parts += [] if self.conv_dtype is None else [f"conv-{DTYPE_NAMES[self.conv_dtype]}"]
        parts += [] if self.weight_dtype is None else [f"weights-{DTYPE_NAMES[self.weight_dtype]}"]
        parts += ["unbiased"] * (not self.conv_bias) + ["norm-first"] * self.norm_before_gate
        return "-".join([*parts, *_tail(self)])

    def function(self) -> Callable[..., Tensor]:
        return fused.mamba2_step

    def inputs(self, device: str) -> dict[str, Any]:
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        B, H, K, V = self.B, self.H, self.K, self.V
        HX, GB, G = self.shared
        D, weights = HX * V + (GB + G) * K, self.weight_dtype or self.dtype
        tensors = {
            "z": normal(B, 1, H, V).to(self.dtype),
            "xbc": normal(B, 1, D).to(self.dtype),
            "conv_state": normal(_rows(self), D, self.W).to(self.conv_dtype or self.dtype),
            "state": normal(_rows(self), H, V, K).to(self.state_dtype),
            **_gates(self, normal),
        }
        parameters = {
            "conv_weight": normal(D, self.W).to(weights),
            "conv_bias": normal(D).to(weights) if self.conv_bias else None,
            "norm_weight": (normal(self.norms, H * V // self.norms) + 1).to(weights),
        }
        parameters = {name: None if t is None else t.to(device) for name, t in parameters.items()}
        dims = {"d_state": K, "x_heads": HX, "b_heads": GB}
        more = {**dims, "eps": 1e-5, "norm_before_gate": self.norm_before_gate}
        return _placed(self, tensors, device) | parameters | _options(self, device) | more

    def tensors(self, x: dict[str, Any]) -> tuple[Any, ...]:
        names = ("z", "xbc", "dt", "conv_weight", "a", "norm_weight", "conv_state", "state")
        optional = ("conv_bias", "d", "dt_bias", "state_indices")
        return tuple(x.get(name) for name in (*names, *optional))


def _rows(case: Case) -> int:
    return case.B if case.index is None else case.B + 2


def _gates(case: Case, normal: Callable[..., Tensor]) -> dict[str, Tensor]:
    dt, a, dt_bias, d = case.gate_dtypes
    gates = {"dt": normal(case.B, 1, case.H) - 1, "a": -normal(case.H).exp(), "dt_bias": normal(case.H) * 0.5}
    gates["d"] = normal(case.H)
    if not case.softplus:
        gates["dt"], gates["dt_bias"] = gates["dt"].abs(), gates["dt_bias"].abs()
    dtypes = {"dt": dt, "a": a, "dt_bias": dt_bias, "d": d}
    return {name: t.to(dtypes[name]) for name, t in gates.items() if dtypes[name] is not None}


def _placed(case: Case, tensors: dict[str, Tensor], device: str) -> dict[str, Any]:
    tensors = {name: t.to(device) for name, t in tensors.items()}
    return {name: every_second(t) for name, t in tensors.items()} if case.strided else tensors


def every_second(t: Tensor) -> Tensor:
    """The same values as every second entry of the batch; of vectors, as every second one."""
    wide = torch.stack([t, torch.full_like(t, torch.nan)], dim=1 if t.ndim > 1 else -1)
    return wide[:, 0] if t.ndim > 1 else wide[..., 0]


def _options(case: Case, device: str) -> dict[str, Any]:
    options: dict[str, Any] = {"dt_softplus": case.softplus, "dt_limit": case.dt_limit}
    if case.index is not None:
        order = torch.tensor([case.B + 1, -1, *range(case.B - 2)][: case.B], dtype=case.index)
        options["state_indices"] = order.to(device)
    return options


def _tail(case: Case) -> list[str]:
    tail = ["none" if d is None else DTYPE_NAMES[d] for d in case.gate_dtypes]
    tail += ["strided"] * case.strided + ["plain"] * (not case.softplus) + ["limited"] * (case.dt_limit is not None)
    return tail if case.index is None else [*tail, str(case.index).removeprefix("torch.")]


STATES = ("state", "conv_state")


def run_and_check(case: Case, device: str, **options: Any) -> None:
    """The public function on the CUDA backend: results and states within twice the reference's error, padding and what
    no index names untouched; of a block the same bits of a settled state."""
    function, inputs = case.function(), case.inputs(device)
    states = [name for name in STATES if name in inputs]
    before = {name: inputs[name].clone() for name in states}
    eager = inputs | {name: t.clone() for name, t in before.items()}
    settled = inputs | {name: t.clone() for name, t in before.items()}
    exact = cast(inputs, FP64) | {name: t.double() for name, t in before.items()}
    o = function(**inputs, backend="cuda", **options)
    o_eager = function(**eager, backend="reference")
    o_exact = function(**exact, backend="reference")
    assert (o.dtype, o.shape, o.is_contiguous()) == (case.dtype, (case.B, 1, case.H, case.V), True)
    within_budget(o, o_eager, o_exact, "o")
    for name in states:
        within_budget(inputs[name], eager[name], exact[name], name)
        if case.index is not None:
            used = inputs["state_indices"][inputs["state_indices"] >= 0].long()
            idle = torch.ones(len(before[name]), dtype=torch.bool, device=device).index_fill(0, used, False)
            assert torch.equal(inputs[name][idle], before[name][idle]), name
    if case.index is not None and case.B > 1:
        assert not o[1].any()
    if isinstance(case, Mamba2Case):  # on a GPU, ordinary kernels have run since those states were made
        assert torch.equal(function(**settled, settled_state=True, backend="cuda", **options), o)
        assert all(torch.equal(settled[name], inputs[name]) for name in states)


NO_GATES = (FP32, FP32, None, None)
CASES = [
    Case(16, 16, FP32, gate_dtypes=(FP32, FP64, FP64, FP32), B=2, index=torch.int64),
    Case(48, 80, gate_dtypes=(BF16, FP32, BF16, BF16), dt_limit=(0.1, 0.5)),
    Case(48, 80, shared=(4, 1, 1), index=None, gate_dtypes=NO_GATES, strided=True),
    Case(112, 48, FP16, BF16, H=6, shared=(3, 6, 2), gate_dtypes=(FP16, FP32, FP16, FP32), strided=True),
    Case(112, 16, FP16, BF16, H=6, shared=(6, 1, 1), softplus=False),
    Case(256, 48, H=2, shared=(1, 1, 1), index=torch.int64),
]
MANY = [Case(128, 64, B=5, H=64, shared=(16, 16, 64), index=None)]  # more than csrc/ssd/step_traits.cuh calls few
MAMBA2_CASES = [
    # A block to each set of two heads, which no norm leaves; then a cluster of six blocks of two heads.
    Mamba2Case(16, 32, FP32, H=4, shared=(2, 2, 4), norms=4, gate_dtypes=(FP32, FP64, FP32, FP32)),
    Mamba2Case(16, 32, FP32, H=12, shared=(12, 1, 1), index=torch.int64, strided=True),
    # Two blocks that share a head, a norm each and one norm.
    Mamba2Case(16, 32, FP32, B=1, H=17, shared=(17, 1, 1), norms=17, index=None),
    Mamba2Case(16, 32, FP32, B=1, H=17, shared=(1, 17, 1), index=None, norm_before_gate=True),
    Mamba2Case(48, 48, H=8, shared=(4, 2, 8), norms=2, weight_dtype=FP32, conv_dtype=FP32, dt_limit=(0.1, 0.5)),
    Mamba2Case(48, 48, H=8, shared=(8, 8, 8), norms=8, weight_dtype=FP32, conv_dtype=FP32, gate_dtypes=NO_GATES),
    Mamba2Case(80, 16, FP16, BF16, H=8, shared=(2, 2, 8), norms=8, W=3, conv_bias=False, softplus=False),
    Mamba2Case(80, 64, FP16, BF16, B=2, H=3, shared=(3, 1, 3), W=3, strided=True),
    # More of the state to each block than may be on its way at once.
    Mamba2Case(256, 96, B=1, H=17, shared=(17, 1, 17), index=None),
    Mamba2Case(256, 96, B=1, H=17, shared=(1, 17, 1), norms=17, index=None),
]
