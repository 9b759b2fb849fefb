"""Inputs of `convolved_ssd` whose sequences are cut into pieces and whose x is most of the channels: what is fused."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hylo_ops.causal_conv1d.reference import causal_conv1d
from hylo_ops.fused import convolved_ssd
from hylo_ops.ssd import cuda_chunk
from hylo_ops.testing import relative_error
from tests.ops.ssd_cases import HEADS, make

NAMES = ("xbc", "weight", "bias", "dt", "a", "d", "dt_bias", "conv_state", "initial_state")  # of the op, in its order
FIRST = 24  # columns of a wider tensor that xbc is a part of, as of a projection


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    T: int
    kind: str  # of HEADS
    V: int
    K: int
    taps: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    initial: bool = True

    @property
    def dims(self) -> tuple[int, int, int, int]:
        _, x_heads, b_heads, _ = HEADS[self.kind]
        return self.V, self.K, x_heads, b_heads

    def inputs(self, device: str) -> dict[str, Any]:
        """The op's tensors by name; xbc has rows further apart than they are wide."""
        tensors = make(self.B, self.T, self.kind, self.V, self.K, self.dtype)
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        xbc = torch.cat([tensors.pop(name).flatten(2) for name in ("x", "b", "c")], -1)
        channels = xbc.shape[2]
        wide = torch.cat([normal(self.B, self.T, FIRST).to(self.dtype), xbc], -1)
        given = {
            "xbc": wide.to(device)[..., FIRST:],
            "weight": (normal(channels, self.taps) * self.taps**-0.5).to(self.dtype),
            "bias": normal(channels) * 0.3 if self.bias else None,
            **tensors,
            "conv_state": None,
        }
        if not self.initial:
            given["initial_state"] = None
        return {name: None if t is None else t.to(device) for name, t in given.items()}


CASES = [
    Case("mamba2", 1, 2061, "mamba2", 64, 128, 4),
    Case("two-sequences-3-taps", 2, 1100, "mamba2", 64, 64, 3, bias=False),
    Case("wide-2-taps", 1, 1500, "mamba2", 128, 128, 2, initial=False),
    Case("grouped-fp16", 1, 1024, "grouped", 64, 64, 4, dtype=torch.float16),
    Case("odd-widths", 1, 1031, "grouped", 48, 48, 4),
]


def mix_and_check(case: Case, device: str) -> None:
    """The kernel that convolves b and c, by itself; it leaves x's room alone."""
    given = case.inputs(device)
    raw, weight, bias = (given[name] for name in ("xbc", "weight", "bias"))
    mixed = torch.full(raw.shape, torch.nan, dtype=case.dtype, device=device)
    last_inputs = torch.full((case.B, *weight.shape), torch.nan, dtype=case.dtype, device=device)
    x, b, c = convolved_ssd.split(mixed, case.dims)
    call = cuda_chunk._Call(None, False, None, x, given["dt"], given["a"], b, c, *[None] * 4, True, None, False)
    of = call.mixed(cuda_chunk.Mixing(raw, weight, bias, mixed, last_inputs))
    call.native.mix(call.kernel("mix"), of)

    first = x.shape[2] * case.V
    wide = [None if t is None else t.double() for t in (raw, weight, bias)]
    exact, inputs = causal_conv1d(*wide, None, None, "silu")
    assert mixed[..., :first].isnan().all()
    found, exact = mixed[..., first:], exact[..., first:]
    rounded = relative_error(exact.to(case.dtype), exact)
    assert relative_error(found, exact) <= 1.01 * rounded, f"{relative_error(found, exact):.3e}, rounded {rounded:.3e}"
    assert torch.equal(last_inputs.double(), inputs)
