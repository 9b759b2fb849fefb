"""Cases of the chunked fp32 kernels of the CUDA backend, and their check against float64.

The emulated driver runs them on the CPU, a GPU on its kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hylo_ops import chunk_gated_delta_rule
from hylo_ops.gated_delta_rule import cuda_chunk_fp32
from hylo_ops.testing import cast, relative_error
from tests.ops.gated_delta_rule_cases import make

SCALE = 0.3
OUTPUT_LIMIT, GRADIENT_LIMIT = 5e-6, 1e-5


@dataclass(frozen=True)
class Case:
    """`bounds` of packed sequences, of which number `broken` is full of NaN."""

    K: int
    V: int
    T: int = 130
    gates: str = "fast"
    B: int = 1
    G: int = 1
    H: int = 2
    bounds: tuple[int, ...] | None = None
    broken: int | None = None
    without_state: bool = False
    strided: bool = False

    @property
    def name(self) -> str:
        parts = [f"B{self.B}-T{self.T}-G{self.G}-H{self.H}-K{self.K}-V{self.V}", self.gates]
        parts += ["packed"] * (self.bounds is not None) + ["fresh"] * self.without_state + ["strided"] * self.strided
        return "-".join(parts)

    @property
    def sequences(self) -> int:
        return self.B if self.bounds is None else len(self.bounds) - 1

    def inputs(self, device: str) -> dict[str, Tensor]:
        """The op's differentiable inputs, in its order."""
        sizes = self.B, self.T, self.G, self.H, self.K, self.V
        inputs: dict[str, Tensor] = make(*sizes, torch.float32, self.gates, self.sequences, device=device)
        if self.bounds is not None and self.broken is not None:
            tokens = slice(*self.bounds[self.broken : self.broken + 2])
            for name in ("q", "k", "v"):
                inputs[name][:, tokens] = torch.nan
        if self.strided:
            for name in ("q", "k", "v"):
                inputs[name] = torch.stack([torch.full_like(inputs[name], torch.nan), inputs[name]], dim=3)[:, :, :, 1]
        if self.without_state:
            del inputs["initial_state"]
        return inputs

    def sound(self, result: Tensor) -> Tensor:
        """Without what is of the broken sequence, of tokens [B, T, ...] or states [N, H, K, V]."""
        if self.bounds is None or self.broken is None:
            return result
        rows = torch.ones(result.shape[1 if result.shape[0] == 1 else 0], dtype=torch.bool, device=result.device)
        if result.shape[0] == 1:
            rows[slice(*self.bounds[self.broken : self.broken + 2])] = False
            return result[:, rows]
        rows[self.broken] = False
        return result[rows]


def launch(case: Case, inputs: dict[str, Tensor], seed: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out, both ways: o, the final state and the inputs' gradients; and the gradients that went in."""
    device = inputs["q"].device
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32, device=device)
    arguments = [*inputs.values(), *([None] if case.without_state else []), cu_seqlens, SCALE, False]
    outputs = cuda_chunk_fp32.forward(*arguments)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator).to(device) for x in outputs]
    return [*outputs, *cuda_chunk_fp32.backward(grads, *arguments)], grads


def run_and_check(case: Case, device: str) -> None:
    """Everything is as near to float64 as it should be, and has the same bits once more."""
    inputs = case.inputs(device)
    found, grads = launch(case, inputs)
    again, _ = launch(case, inputs)
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32, device=device)
    leaves = {name: x.detach().requires_grad_() for name, x in cast(inputs, torch.float64).items()}
    exact = chunk_gated_delta_rule(**leaves, scale=SCALE, cu_seqlens=cu_seqlens, backend="reference")
    exact_gradients = torch.autograd.grad(exact, list(leaves.values()), [grad.double() for grad in grads])
    for i, (name, x) in enumerate(zip(["o", "final_state", *inputs], [*exact, *exact_gradients], strict=True)):
        limit = OUTPUT_LIMIT if i < len(exact) else GRADIENT_LIMIT
        error = relative_error(case.sound(found[i]), case.sound(x.detach()))
        assert error <= limit, f"{name}: {error:.2e}, limit {limit}"
        assert torch.equal(case.sound(found[i]), case.sound(again[i])), f"{name} differs from run to run"
        if name == "g":
            assert not found[i][torch.isneginf(inputs["g"])].any(), "a reset has a gradient"


PACKED = (0, 0, 70, 70, 71, 130, 130)
CASES = [
    Case(48, 16, 65, "hostile"),
    Case(48, 80, 70, "slow", B=2, H=1),
    Case(64, 32, 64, G=2, without_state=True),
    Case(64, 16, 130, "hostile", H=3, bounds=PACKED, broken=4),
    Case(64, 16, 1),
    Case(64, 16, 0),
    Case(80, 16, 70, "hostile", H=1, bounds=(0, 3, 3, 70), broken=0, without_state=True),
    Case(128, 48, 129, "slow", H=1, strided=True),
    Case(128, 96, 333, "slow", H=3),
    Case(256, 16, 66, H=1),
    Case(240, 80, 200, "hostile", bounds=(0, 64, 64, 130, 200), broken=2),
]
