"""Cases of products of few rows, and their check against float64.

The emulated driver runs those of EMULATED on the CPU, a GPU all on its kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_ops.causal_conv1d.reference import recurrent_causal_conv1d
from hylo_ops.testing import DTYPE_NAMES, cast, within_budget

BF16, FP16 = torch.bfloat16, torch.float16

# Of x, weight, residual, swiglu, constant, spread, norm, eps, conv_weight, conv_state and silu, of the convolution.
Run = Callable[..., Tensor]
TAPS, EPS = 4, 1e-5


@dataclass(frozen=True)
class Case:
    """[B, K] times weights of N outputs; NaN around both where no row or column of theirs lies.

    spare: columns between the rows of x and of weights. cluster: blocks that share K; 0: what suits the case. channels:
    outputs that go through a convolution and SiLU.
    """

    N: int
    K: int
    B: int
    swiglu: bool = False
    residual: bool = False
    dtype: torch.dtype = BF16
    spare: int = 0
    cluster: int = 0
    channels: int = 0
    norm: bool = False

    @property
    def name(self) -> str:
        parts = [f"N{self.N}-K{self.K}-B{self.B}-{DTYPE_NAMES[self.dtype]}"]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value and field.name != "dtype":
                parts.append(field.name if value is True else f"{field.name}{value}")
        return "-".join(parts)

    @property
    def spread(self) -> tuple[int, int, int] | None:
        return (self.cluster, 2, 1) if self.cluster else None

    def inputs(self, device: str) -> dict[str, Any]:
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        outputs = self.N * (2 if self.swiglu else 1)
        x = amid_nan(normal(self.B, self.K), self.spare, self.dtype, device)
        weight = amid_nan(normal(outputs, self.K) / self.K**0.5, self.spare, self.dtype, device)
        residual = normal(self.B, self.N).to(self.dtype).to(device) if self.residual else None
        conv: dict[str, Any] = {"conv_weight": None, "conv_state": None}
        if self.channels:
            states = normal(self.B, self.channels, TAPS).to(self.dtype).to(device)
            conv = {"conv_weight": normal(self.channels, TAPS).to(states), "conv_state": states}
        norm = normal(self.K).to(weight) if self.norm else None
        return {"x": x, "weight": weight, "residual": residual, "swiglu": self.swiglu, "norm": norm, **conv}


def amid_nan(matrix: Tensor, spare: int, dtype: torch.dtype, device: str) -> Tensor:
    """The matrix with as many columns behind each row, and with rows before and behind."""
    rows, columns = matrix.shape
    whole = torch.full((rows + 136, columns + spare), torch.nan, dtype=dtype, device=device)
    view = whole[8 : 8 + rows, :columns]
    view.copy_(matrix)
    return view


def between_nan(states: Tensor) -> Tensor:
    """A copy of the states, with other channels between those of two sequences."""
    sequences, channels, taps = states.shape
    view = states.new_full((sequences, channels + 3, taps), torch.nan)[:, 2:-1]
    return view.copy_(states)


def eager(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    swiglu: bool,
    norm: Tensor | None,
    conv_weight: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor:
    """What rounds after each op. The states stay as they were."""
    x = x if norm is None else F.rms_norm(x, norm.shape, norm, EPS)
    y = x @ weight.mT
    if conv_weight is not None:
        mixed = y[:, None, : len(conv_weight)]
        y[:, : len(conv_weight)] = recurrent_causal_conv1d(mixed, conv_weight, None, conv_state.clone(), None, "silu")[
            :, 0
        ]
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def run_and_check(case: Case, device: str, run: Run) -> None:
    """As near to float64 as eager, and the same bits from run to run, whatever else there is."""
    x = case.inputs(device)
    weight = x["weight"].clone()
    states: list[Tensor | None] = []

    def y_of(rows: slice, constant: bool) -> Tensor:
        some = x["x"][rows]
        residual = None if x["residual"] is None else x["residual"][rows].clone()
        state = None if x["conv_state"] is None else between_nan(x["conv_state"][rows])
        others = x["norm"], EPS, x["conv_weight"], state, True
        y = run(some, x["weight"], residual, case.swiglu, constant, case.spread, *others)
        assert residual is None or y.data_ptr() == residual.data_ptr(), "the residual is not what is given back"
        states.append(state)
        return y

    every = slice(None)
    y = y_of(every, True)
    within_budget(y, eager(**x), eager(**cast(x, torch.float64)))
    check_state(x, states[0])
    for constant in (True, False, False):
        assert torch.equal(y_of(every, constant), y), "y differs from run to run"
        assert states[0] is None or torch.equal(states[-1], states[0]), "states differ from run to run"
    last = slice(case.B - 1, case.B)
    assert torch.equal(y_of(last, True), y[last]), "a row alone gives other bits"
    x["x"][: case.B - 1] = torch.nan
    assert torch.equal(y_of(every, True)[last], y[last]), "a row depends on others"
    assert torch.equal(x["weight"], weight), "weights were written"


def check_state(x: dict[str, Any], state: Tensor | None) -> None:
    """What was there moves on by one, and what is new is the product."""
    if state is None:
        return
    assert torch.equal(state[..., :-1], x["conv_state"][..., 1:]), "what was there did not move on"
    product = {name: x[name] for name in ("x", "norm")} | {"weight": x["weight"][: len(x["conv_weight"])]}
    product |= dict.fromkeys(("residual", "swiglu", "conv_weight", "conv_state"))
    within_budget(state[..., -1], eager(**product), eager(**cast(product, torch.float64)))


EMULATED = [
    Case(2048, 256, 1, cluster=1),
    Case(128, 64, 1),
    Case(8, 64, 7),
    Case(400, 384, 7, cluster=3),
    Case(136, 640, 16, cluster=4),
    Case(128, 8192, 1),
    Case(136, 8192, 33),
    Case(200, 1152, 64),
    Case(264, 448, 64, cluster=1),
    Case(136, 960, 64, cluster=7),
    Case(256, 1024, 33, cluster=2),
    Case(136, 1536, 17, cluster=2),
    Case(136, 896, 32, cluster=1),
    Case(264, 1216, 32, residual=True, cluster=5),
    Case(136, 2048, 1, residual=True),
    Case(136, 2048, 64, residual=True),
    Case(392, 512, 33, residual=True, cluster=1),
    Case(2048, 192, 16, residual=True, spare=8),
    Case(64, 1024, 1, swiglu=True),
    Case(200, 576, 7, swiglu=True, spare=24),
    Case(136, 1024, 64, swiglu=True, cluster=1),
    Case(8, 1088, 16, swiglu=True, cluster=8),
    Case(72, 640, 33, swiglu=True, spare=64),
    Case(136, 1024, 7, dtype=FP16, spare=8),
    Case(136, 640, 33, residual=True, dtype=FP16),
    Case(136, 640, 64, swiglu=True, dtype=FP16),
    Case(264, 512, 1, channels=200),
    Case(136, 640, 7, channels=136, cluster=3),
    Case(400, 512, 33, channels=130, dtype=FP16, cluster=2),
    Case(200, 1024, 64, channels=77, spare=8),
    Case(136, 256, 64, channels=1, cluster=1),
    Case(264, 512, 1, norm=True),
    Case(136, 640, 7, norm=True, residual=True, cluster=3),
    Case(136, 1024, 33, norm=True, swiglu=True, cluster=2),
    Case(200, 576, 64, norm=True, swiglu=True, cluster=1, spare=8),
    Case(200, 1152, 64, norm=True, channels=77, cluster=7),
    Case(136, 2048, 17, norm=True, channels=136),
]
# Those of a model with two billion weights, and a row more or less than a kernel is compiled for.
WHOLE = [
    *(Case(8192, 2048, B, swiglu=True, norm=True) for B in (1, 64)),
    *(Case(2048, 8192, B, residual=True) for B in (1, 16, 17, 64)),
    *(Case(9232, 2048, B, channels=6144, norm=True) for B in (1, 32, 64)),
    *(Case(128256, 2048, B) for B in (1, 64)),
]
