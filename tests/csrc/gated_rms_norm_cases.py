"""Inputs for the CUDA gated RMS norm, for the GPU and for the emulated driver alike, and the float64 formula."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hylo_ops.gated_rms_norm import reference
from hylo_ops.testing import DTYPE_NAMES, within_budget


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def slice_of_projection(x: Tensor) -> Tensor:
    """As a model has it: [B, T, 3 * H * V] cut in three, so rows of other things lie between."""
    b, t, h, v = x.shape
    wide = torch.full((b, t, 3, h, v), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, :, 1] = x
    return wide[:, :, 1]


def heads_first(x: Tensor) -> Tensor:
    """Stored [B, H, T, V]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def batch_repeated(x: Tensor) -> Tensor:
    """One batch entry seen B times: batch stride 0."""
    return x[:1].expand(x.shape)


def starting_at(elements: int) -> Callable[[Tensor], Tensor]:
    """Contiguous, but `elements` into its storage."""

    def shifted(x: Tensor) -> Tensor:
        storage = torch.full((x.numel() + elements,), float("nan"), dtype=x.dtype, device=x.device)
        storage[elements:] = x.flatten()
        return storage[elements:].view(x.shape)

    return shifted


@dataclass(frozen=True)
class Case:
    """B, T, H, V; `vector` is the access width in elements that the layouts allow."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    vector: int
    norm_before_gate: bool = True
    weight_heads: bool = False
    weight_dtype: torch.dtype | None = None
    x_layout: Callable[[Tensor], Tensor] = contiguous
    gate_layout: Callable[[Tensor], Tensor] = contiguous
    dy_layout: Callable[[Tensor], Tensor] = contiguous
    eps: float = 1e-5
    label: str = ""

    @property
    def name(self) -> str:
        dims = "-".join(f"{letter}{size}" for letter, size in zip("BTHV", self.shape, strict=True))
        order = "norm_first" if self.norm_before_gate else "gate_first"
        return "-".join(filter(None, [dims, DTYPE_NAMES[self.dtype], order, self.label]))

    @property
    def defines(self) -> tuple[tuple[str, int | str], ...]:
        weight = DTYPE_NAMES[self.weight_dtype or self.dtype]
        return (("V", self.shape[3]), ("VEC", self.vector), ("T", DTYPE_NAMES[self.dtype]), ("W", weight))

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(11)
        weight_shape = self.shape[2:] if self.weight_heads else self.shape[3:]
        x = torch.randn(self.shape, generator=generator).to(device, self.dtype)
        gate = (4 * torch.randn(self.shape, generator=generator)).to(device, self.dtype)
        weight = torch.randn(weight_shape, generator=generator).to(device, self.weight_dtype or self.dtype)
        return self.x_layout(x), self.gate_layout(gate), weight

    def dy(self, device: str) -> Tensor:
        """A gradient of y."""
        dy = torch.randn(self.shape, generator=torch.Generator().manual_seed(12))
        return self.dy_layout(dy.to(device, self.dtype))


def exact(x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool) -> Tensor:
    """The formula in float64, written down independently of the project's reference."""
    x, gate, weight = x.double(), gate.double(), weight.double()
    swish = gate / (1 + torch.exp(-gate))
    if norm_before_gate:
        return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight * swish
    z = x * swish
    return z / torch.sqrt((z * z).mean(dim=-1, keepdim=True) + eps) * weight


def run_and_check(case: Case, device: str, forward: Callable[..., Tensor]) -> Tensor:
    """Shape, dtype, layout, and the error budget: at most twice eager PyTorch's distance from float64."""
    x, gate, weight = case.inputs(device)
    y = forward(x, gate, weight, case.eps, case.norm_before_gate)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    eager = reference.gated_rms_norm(x, gate, weight, case.eps, case.norm_before_gate)
    within_budget(y, eager, exact(x, gate, weight, case.eps, case.norm_before_gate), case.name)
    return y


Backward = Callable[..., list[Tensor]]


def run_and_check_backward(case: Case, device: str, backward: Backward) -> list[Tensor]:
    """dx, dgate, dweight: shape, dtype, the error budget, and the same bits twice."""
    x, gate, weight = case.inputs(device)
    inputs, options, dy = (x, gate, weight), (case.eps, case.norm_before_gate), case.dy(device)
    found = backward([dy], *inputs, *options)
    again = backward([dy], *inputs, *options)
    eager = gradients_of(reference.gated_rms_norm, inputs, options, dy)
    wanted = gradients_of(exact, [t.double() for t in inputs], options, dy.double())
    for i, name in enumerate(("dx", "dgate", "dweight")):
        assert found[i].shape == inputs[i].shape
        assert found[i].dtype == inputs[i].dtype
        assert torch.equal(found[i], again[i]), f"{case.name} {name}: other bits"
        within_budget(found[i], eager[i], wanted[i], f"{case.name} {name}")
    return found


def gradients_of(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], options: tuple[float, bool], dy: Tensor
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves, *options), leaves, dy)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    Case((2, 7, 3, 64), _BF16, 8),
    Case((2, 7, 3, 64), _BF16, 8, norm_before_gate=False, weight_heads=True),
    Case((2, 5, 4, 64), _BF16, 8, weight_heads=True, gate_layout=slice_of_projection, label="strided_gate"),
    Case((2, 5, 4, 64), _BF16, 8, x_layout=heads_first, gate_layout=batch_repeated, label="strided_both"),
    Case((3, 5, 4, 64), _BF16, 4, x_layout=starting_at(4), label="misaligned_x"),
    Case((3, 5, 4, 64), _BF16, 4, gate_layout=starting_at(4), label="misaligned_gate"),
    Case((5, 1, 3, 64), _BF16, 8, False, True, x_layout=slice_of_projection, label="decode"),
    Case((1, 1, 1, 512), _BF16, 8),
    Case((2, 3, 5, 512), _BF16, 8, weight_dtype=_FP32, weight_heads=True, label="weight_fp32"),
    Case((1, 9, 3, 20), _FP32, 4),
    Case((1, 37, 2, 8), _FP16, 8, norm_before_gate=False),
    Case((2, 3, 3, 13), _FP32, 1, False, True, x_layout=heads_first, label="odd_width"),
    Case((1, 3, 3, 333), _BF16, 1, label="odd_width"),
    Case((2, 3, 1, 1000), _FP16, 8, norm_before_gate=False, label="two_warps"),
    Case((1, 3, 1, 16384), _FP32, 4, label="widest"),
    Case((2, 0, 3, 64), _BF16, 8, label="no_rows"),
]

# Of the backward alone. On one multiprocessor these are several rows a thread.
BACKWARD_CASES = [
    Case((2, 37, 3, 64), _BF16, 8, label="many_rows"),
    Case((2, 37, 3, 64), _BF16, 8, False, True, dy_layout=slice_of_projection, label="many_rows"),
    Case((3, 23, 4, 64), _BF16, 8, False, True, x_layout=heads_first, label="many_rows_in_batches"),
    Case((1, 7, 4, 64), _BF16, 8, dy_layout=starting_at(4), label="misaligned_dy"),
    Case((2, 13, 4, 64), _BF16, 8, dy_layout=batch_repeated, weight_dtype=_FP32, label="weight_fp32"),
    Case((2, 9, 3, 512), _BF16, 8, weight_heads=True, label="many_rows"),
    Case((1, 11, 1, 2048), _BF16, 8, False, True, label="group"),
    Case((1, 6, 2, 2048), _FP16, 8, False, weight_heads=True, label="groups"),
    Case((1, 1001, 1, 1), _BF16, 1, label="narrowest"),
    Case((2, 2, 2, 4104), _BF16, 8, False, True, label="read_twice"),
]

# Each width is a kernel to compile for the CPU: those left out show nothing that others do not.
EMULATED_BACKWARD_CASES = [case for case in (*CASES, *BACKWARD_CASES) if case.shape[3] not in (8, 20, 1000)]
