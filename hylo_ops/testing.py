"""What tests and benchmarks share: names of dtypes, gradients, and the error budget."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact value; NaN or Inf in the result counts as infinite."""
    if result.numel() == 0:
        return 0.0
    if not torch.isfinite(result).all():
        return float("inf")
    exact = exact.to(torch.float64)
    scale = exact.square().mean().sqrt().clamp(min=1e-30)
    return float((result.to(torch.float64) - exact).square().mean().sqrt() / scale)


def within_budget(result: Tensor, eager: Tensor, exact: Tensor, name: str = "result") -> None:
    """Fails unless the result is at most twice as far from the float64 value as eager PyTorch in the same dtype."""
    ours, theirs = relative_error(result, exact), relative_error(eager, exact)
    floor = torch.finfo(result.dtype).eps / 8
    assert ours <= 2 * max(theirs, floor), f"{name}: error {ours:.2e} of float64, eager has {theirs:.2e}"


def gradients(
    function: Callable[..., Any], inputs: dict[str, Any], wanted: Sequence[str], weights: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of all outputs, in the inputs' dtypes.

    Args:
        weights: whose numbers the projection has. With float64's, an output of 16 bits rounds its own gradient, which
            then counts as the op's error; with bfloat16's no dtype does.
    """
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wanted}
    outputs = function(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(device="cpu").manual_seed(7)
    total: Any = 0.0
    for output in outputs:
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(weights).double()
        total = total + (output.double() * drawn.to(output.device)).sum()
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def cast(inputs: dict[str, Any], dtype: torch.dtype, keep: Sequence[str] = ()) -> dict[str, Any]:
    """Floating tensors in another dtype, but for those named in `keep`."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and name not in keep else value
        for name, value in inputs.items()
    }
