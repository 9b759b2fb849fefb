"""Cases of ssd's plain kernels of the CUDA backend, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hylo_ops import chunk_ssd
from hylo_ops.ssd import cuda_plain
from hylo_ops.testing import cast, relative_error
from tests.ops.ssd_cases import make

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-6, 4e-6  # of what is fp32
ROUNDINGS = 1.05  # what has 16 bits is fp32's result rounded once
NAMES = ("x", "dt", "a", "b", "c", "d", "dt_bias", "initial_state")
OPTIONAL = ("d", "dt_bias", "initial_state")


@dataclass(frozen=True)
class Case:
    """`bounds` of packed sequences, of which number `broken` is full of NaN.

    strong: decays of exp(-400) a chunk, and in one head of nothing less than all.
    """

    kind: str
    V: int
    K: int
    T: int = 70
    gates: str = "fast"
    dtype: torch.dtype = FP32
    dt_dtype: torch.dtype | None = None
    B: int = 1
    bounds: tuple[int, ...] | None = None
    broken: int | None = None
    bare: bool = False
    strided: bool = False
    strong: bool = False
    softplus: bool = True
    limit: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.kind}-B{self.B}-T{self.T}-K{self.K}-V{self.V}", str(self.dtype).removeprefix("torch.")]
        parts += ["strong" if self.strong else self.gates]
        parts += [] if self.dt_dtype is None else [f"dt-{str(self.dt_dtype).removeprefix('torch.')}"]
        parts += ["packed"] * (self.bounds is not None) + ["bare"] * self.bare + ["strided"] * self.strided
        parts += ["steps"] * (not self.softplus) + ["limit"] * (self.limit is not None)
        return "-".join(parts)

    @property
    def sequences(self) -> int:
        return self.B if self.bounds is None else len(self.bounds) - 1

    def inputs(self, device: str) -> dict[str, Any]:
        """The op's differentiable inputs, in its order; None is left out."""
        made = make(self.B, self.T, self.kind, self.V, self.K, self.dtype, self.gates, self.sequences, device)
        inputs = {name: made[name] for name in NAMES}
        if not self.softplus:
            inputs |= {"dt": inputs["dt"].abs() / 30, "dt_bias": inputs["dt_bias"].abs() / 100}
        if self.strong:
            inputs["a"] = -torch.linspace(100, 1600, len(inputs["a"]), device=device)
            inputs["a"][0] = -1e8
            inputs["dt"] = torch.full_like(inputs["dt"], 1 / 256)
            inputs["dt_bias"] = torch.zeros_like(inputs["dt_bias"])
        if self.dt_dtype is not None:
            inputs |= {name: inputs[name].to(self.dt_dtype) for name in ("dt", "a")}
        if self.bounds is not None and self.broken is not None:
            inputs["x"][:, slice(*self.bounds[self.broken : self.broken + 2])] = torch.nan
            inputs["b"][:, slice(*self.bounds[self.broken : self.broken + 2])] = torch.nan
        if self.strided:
            for name in ("x", "dt", "b", "c"):
                inputs[name] = torch.stack([torch.full_like(inputs[name], torch.nan), inputs[name]], dim=2)[:, :, 1]
        return inputs | (dict.fromkeys(OPTIONAL) if self.bare else {})

    def sound(self, name: str, result: Tensor) -> Tensor:
        """Without what the broken sequence reaches: its own tokens and states, and all of what sums over tokens."""
        if self.bounds is None or self.broken is None:
            return result
        if name in ("a", "d", "dt_bias"):
            return result[:0]
        of_states = name in ("final_state", "initial_state")
        kept = torch.ones(result.shape[0 if of_states else 1], dtype=torch.bool, device=result.device)
        kept[self.broken if of_states else slice(*self.bounds[self.broken : self.broken + 2])] = False
        return result[kept] if of_states else result[:, kept]


def launch(case: Case, inputs: dict[str, Any], seed: int = 7) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What comes out, both ways: o, the final state and the inputs' gradients; and the gradients that went in."""
    device = inputs["x"].device
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32, device=device)
    arguments = [*inputs.values(), cu_seqlens, case.softplus, case.limit, False]
    outputs = cuda_plain.forward(*arguments)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    names = ["o", "final_state", *(name for name, x in inputs.items() if x is not None)]
    return dict(zip(names, [*outputs, *cuda_plain.backward(grads, *arguments)], strict=True)), grads


def errors(case: Case, device: str) -> dict[str, float]:
    """Of every output and gradient, in units of what it may be; their types and that they have the same bits once more
    are asserted."""
    inputs = case.inputs(device)
    found, grads = launch(case, inputs)
    again, _ = launch(case, inputs)
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32, device=device)
    exact = cast(inputs, torch.float64)
    leaves = {name: x.detach().requires_grad_() for name, x in exact.items() if x is not None}
    options = {"dt_softplus": case.softplus, "dt_limit": case.limit, "cu_seqlens": cu_seqlens, "backend": "reference"}
    outputs = chunk_ssd(**exact | leaves, **options)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [grad.double() for grad in grads])
    units = {}
    for name, x in zip(found, [*outputs, *gradients], strict=True):
        result, x = case.sound(name, found[name]), case.sound(name, x.detach())
        assert torch.equal(result, case.sound(name, again[name])), f"{name} differs from run to run"
        assert result.dtype == (inputs[name].dtype if name in inputs else case.dtype if name == "o" else FP32), name
        limit = OUTPUT_LIMIT if name in ("o", "final_state") else GRADIENT_LIMIT
        if result.dtype in (BF16, FP16):
            limit += ROUNDINGS * relative_error(x.to(result.dtype), x)
        units[name] = relative_error(result, x) / limit
    return units


def run_and_check(case: Case, device: str) -> None:
    """Everything is as near to float64 as it should be."""
    for name, error in errors(case, device).items():
        assert error <= 1, f"{name}: {error:.2f} times the limit"


PACKED = (0, 0, 70, 70, 71, 130, 130)
CASES = [
    Case("equal", 64, 64, 130),
    Case("hylo", 64, 64, 66, "hostile"),
    Case("mamba2", 16, 128, 65, "slow"),
    Case("grouped", 80, 48, 64, B=2),
    Case("equal", 48, 240, 129, "hostile", strided=True),
    Case("equal", 144, 256, 70, "slow", bare=True),
    Case("mamba2", 16, 16, 130, "hostile", bounds=PACKED, broken=4),
    Case("equal", 16, 16, 1),
    Case("equal", 16, 16, 0),
    Case("mamba2", 32, 64, 200, strong=True, softplus=False),
    Case("mamba2", 16, 64, 90, limit=(0.01, 0.1)),
    Case("equal", 64, 80, 66, softplus=False, limit=(0.0, float("inf")), dt_dtype=torch.float64),
    Case("equal", 32, 256, 130, "hostile", dtype=BF16, dt_dtype=FP32, strided=True),
    Case("mamba2", 144, 64, 70, "slow", dtype=FP16),
    Case("equal", 16, 192, 65, dtype=BF16, bounds=(0, 3, 3, 65), broken=0),
]
