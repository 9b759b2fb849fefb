"""The CUDA backend of the gated RMS norm: picks the kernels for the inputs, launches them on the current stream."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hylo_ops import cubin

KERNEL = "gated_rms_norm_fwd_kernel_y"
BACKWARD_KERNELS = {True: "gated_rms_norm_bwd_kernel_norm_first", False: "gated_rms_norm_bwd_kernel_gate_first"}
DWEIGHT_KERNEL = "gated_rms_norm_bwd_kernel_dweight"
MAX_WIDTH = 16384  # kMaxWidth of csrc/gated_rms_norm/traits.cuh

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MAX_ACCESS_BYTES = 16
_Key = tuple[int, torch.dtype, torch.dtype, int, int, str | None]

_launchers: dict[_Key, Callable[..., None]] = {}
_backward_launchers: dict[tuple[_Key, bool], Callable[..., None]] = {}


def forward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, norm_before_gate: bool, *, cubin_source: str | None = None
) -> Tensor:
    """The op's forward for inputs that `why_not` lets pass; see `hylo_ops.gated_rms_norm` for shapes.

    Never synchronises. The first call of a shape loads its kernel, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    device = x.get_device()
    vector = _vector(weight, x, gate)
    key = (device, x.dtype, weight.dtype, x.shape[3], vector, cubin_source)
    launch = _launchers.get(key) or _load(key)
    launch(
        x.data_ptr(),
        gate.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.shape,
        x.stride(),
        gate.stride(),
        weight.stride(0) if weight.ndim == 2 else 0,
        vector,
        eps,
        norm_before_gate,
        torch._C._cuda_getCurrentRawStream(device),
    )
    return y


def backward(
    grads: list[Tensor],
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    norm_before_gate: bool,
    *,
    cubin_source: str | None = None,
) -> list[Tensor]:
    """Gradients of x, gate and weight, in their dtypes; as `forward` otherwise.

    Args:
        grads: the gradient of y.
    """
    vector = _vector(weight, x, gate)
    dy = grads[0].to(x.dtype)
    if dy.stride(-1) != 1 or _vector(weight, dy) < vector:
        dy = dy.clone(memory_format=torch.contiguous_format)
    dx, dgate, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, gate, weight))
    if not x.numel():
        return [dx, dgate, dweight.zero_()]
    device, width = x.get_device(), x.shape[3]
    shared = weight.ndim == 1 or weight.shape[0] == 1
    key = (device, x.dtype, weight.dtype, width, vector, cubin_source), norm_before_gate
    launch = _backward_launchers.get(key) or _load_backward(*key)
    grid = cubin.native().gated_rms_norm_backward_grid(
        x.shape, vector, x.element_size(), weight.element_size(), _multiprocessors(device)
    )
    lines = grid.blocks if shared else grid.blocks * grid.rows
    partials = x.new_empty((lines, width), dtype=torch.float32)
    launch(
        grid,
        (dy.data_ptr(), x.data_ptr(), gate.data_ptr(), weight.data_ptr()),
        (dx.data_ptr(), dgate.data_ptr(), dweight.data_ptr()),
        partials.data_ptr(),
        x.shape,
        (dy.stride(), x.stride(), gate.stride()),
        0 if shared else weight.stride(0),
        shared,
        vector,
        x.element_size(),
        eps,
        torch._C._cuda_getCurrentRawStream(device),
    )
    return [dx, dgate, dweight]


def why_not(x: Tensor, gate: Tensor, weight: Tensor, **_: Any) -> str | None:
    """The reason why the kernels cannot take these inputs, or None. Shapes are taken to be the op's."""
    if not x.is_cuda:
        return f"x is on {x.device}, not on a CUDA device"
    if x.dtype not in _TYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if gate.dtype != x.dtype:
        return f"gate is {gate.dtype}, x is {x.dtype}"
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        return f"weight is {weight.dtype}, neither {x.dtype} as x is nor float32"
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight)):
        if tensor.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous: its strides are {tensor.stride()}"
    width = x.shape[3]
    if not 0 < width <= MAX_WIDTH:
        return f"V is {width}, not between 1 and {MAX_WIDTH}"
    reason = cubin.why_not_device(x.get_device()) or cubin.why_not_native()
    if reason is None and cubin.why_not_nvrtc() is not None:  # then only what is packaged runs
        dims = x.dtype, weight.dtype, width, _vector(weight, x, gate)
        reason = cubin.why_not(_spec(*dims)) or cubin.why_not(_spec(*dims, unit="backward"))
    return reason


def _load(key: _Key) -> Callable[..., None]:
    device, x_dtype, weight_dtype, width, vector, source = key
    kernel = cubin.load(_spec(x_dtype, weight_dtype, width, vector), KERNEL, device, source=source)
    _launchers[key] = functools.partial(cubin.native().gated_rms_norm_forward, kernel)
    return _launchers[key]


def _load_backward(key: _Key, norm_before_gate: bool) -> Callable[..., None]:
    device, x_dtype, weight_dtype, width, vector, source = key
    spec = _spec(x_dtype, weight_dtype, width, vector, unit="backward")
    kernels = [
        cubin.load(spec, name, device, source=source) for name in (BACKWARD_KERNELS[norm_before_gate], DWEIGHT_KERNEL)
    ]
    launch = functools.partial(cubin.native().gated_rms_norm_backward, *kernels)
    _backward_launchers[key, norm_before_gate] = launch
    return launch


@functools.cache
def _spec(x_dtype: torch.dtype, weight_dtype: torch.dtype, width: int, vector: int, unit: str = "kernel") -> cubin.Spec:
    types = (("T", _TYPES[x_dtype]), ("W", _TYPES[weight_dtype]))
    return cubin.Spec("gated_rms_norm", (("V", width), ("VEC", vector), *types), unit)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _vector(weight: Tensor, *tensors: Tensor) -> int:
    """Elements of one access: as many as 16 bytes hold and every row's start is aligned to."""
    size, weight_size = tensors[0].element_size(), weight.element_size()
    starts, steps = _MAX_ACCESS_BYTES, weight.shape[-1]
    for tensor in tensors:
        b, t, h, _ = tensor.stride()
        starts |= tensor.data_ptr()
        steps |= b | t | h
    weight_starts = weight.data_ptr() | (weight.stride(0) * weight_size if weight.ndim == 2 else 0)
    # The weight is read by as many elements, so its bytes count by the ratio of the sizes.
    starts |= steps * size | weight_starts * size // weight_size
    return (starts & -starts) // size
