"""The CUDA backend of the gated delta rule: picks kernels for the inputs, launches them on the current stream."""

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hylo_ops import cubin

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_STEP_TYPES = _TYPES | {torch.float32: "fp32"}
_STEP_ROWS = 16  # kStepRows of csrc/gated_delta_rule/step_traits.cuh
_HALF_ULP_BITS = {torch.bfloat16: 9, torch.float16: 12}
_WIDTHS = (64, 128, 256)
_CHUNK = 64  # kChunk of csrc/gated_delta_rule/traits.cuh
_COLUMNS = 64  # of V, each warpgroup's
_MAX_SEGMENTS = 32
_LEAST_SEGMENT = 4  # chunks; the warm-up of fast gates takes one or two
_ALIGNMENT = 16  # bytes, of what the copy engine reads


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    fixed_split: bool,
    *,
    cubin_source: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`chunk_gated_delta_rule` for inputs that `chunk_why_not` lets pass.

    Never synchronises. The first call of a shape loads its kernels, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    B, T, G, K = q.shape
    H, V = v.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * -(-T // _CHUNK) if cu_seqlens is None else T // _CHUNK + N  # no sequence leaves two chunks unfilled
    device = q.get_device()
    warpgroups = _warpgroups(K, V, H * N, device)
    inverse, output = _kernels(device, q.dtype, K, warpgroups, cubin_source)
    g, beta = g.float().contiguous(), beta.float().contiguous()
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = q.new_empty((N, H, K, V), dtype=torch.float32)
    records = q.new_empty((chunks, H, cubin.native().gated_delta_rule_record_size()), dtype=torch.uint8)
    if N and H:
        cubin.native().gated_delta_rule_forward(
            inverse,
            output,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            g.data_ptr(),
            beta.data_ptr(),
            _pointer(initial_state),
            _pointer(bounds),
            records.data_ptr(),
            o.data_ptr(),
            final_state.data_ptr(),
            (B, T, G, H, K, V, N),
            q.stride(),
            k.stride(),
            v.stride(),
            warpgroups,
            chunks if T else 0,
            1 if fixed_split else _segments(chunks, N, V // (_COLUMNS * warpgroups) * H * N, device),
            scale,
            -(_HALF_ULP_BITS[q.dtype] + 1) * math.log(2),
            torch._C._cuda_getCurrentRawStream(device),
        )
    return o, final_state


def chunk_why_not(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, **_: Any
) -> str | None:
    """The reason why `chunk_forward` cannot take these inputs, or None. Shapes are taken to be the op's."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if q.dtype not in _TYPES:
        return f"q is {q.dtype}, not bfloat16 or float16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of one dtype"
    if initial_state is not None and initial_state.dtype == torch.float64:
        return "the state is float64"
    K, V = q.shape[3], v.shape[3]
    if K not in _WIDTHS:
        return f"K is {K}, not one of {list(_WIDTHS)}"
    if V % _COLUMNS or not V:
        return f"V is {V}, not a multiple of {_COLUMNS}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not _reachable(tensor):
            return f"the copy engine cannot read {name}: strides {tensor.stride()} or its start are not 16-byte aligned"
    return cubin.why_not_device(q.get_device()) or cubin.why_not_native()


def recurrent_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    state_indices: Tensor | None,
    *,
    cubin_source: str | None = None,
) -> Tensor:
    """`recurrent_gated_delta_rule` for inputs that `recurrent_why_not` lets pass: one launch, never synchronises."""
    (B, _, G, K), (_, _, H, V) = q.shape, v.shape
    device = q.get_device()
    kernel = _step_kernel(device, q.dtype, state.dtype, g.dtype, K, cubin_source)
    indices = None if state_indices is None else state_indices.contiguous()
    o = v.new_empty(v.shape)
    strides = [step for x in (q, k, v, g, beta) for step in (x.stride(0), x.stride(2))]
    cubin.native().gated_delta_rule_step(
        kernel,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        g.data_ptr(),
        beta.data_ptr(),
        state.data_ptr(),
        _pointer(indices),
        o.data_ptr(),
        (B, G, H, V),
        (*strides, state.stride(0), state.stride(1)),
        state.element_size(),
        indices is not None and indices.dtype == torch.int64,
        scale,
        torch._C._cuda_getCurrentRawStream(device),
    )
    return o


def recurrent_why_not(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, **_: Any) -> str | None:
    """The reason why `recurrent_forward` cannot take these inputs, or None. Shapes are taken to be the op's."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    types = (q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype, state.dtype)
    if q.dtype not in _STEP_TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {types[:3]}, not of one of bfloat16, float16 and float32"
    if g.dtype not in _STEP_TYPES or beta.dtype != g.dtype:
        return f"g and beta are {types[3:5]}, not of one of bfloat16, float16 and float32"
    if state.dtype not in (torch.float32, torch.bfloat16):
        return f"the state is {state.dtype}, not float32 or bfloat16"
    K, V = state.shape[2:]
    if K % _STEP_ROWS or not 0 < K <= _WIDTHS[-1]:
        return f"K is {K}, not a multiple of {_STEP_ROWS} up to {_WIDTHS[-1]}"
    columns = 128 // state.element_size()
    if V % columns or not V:
        return f"V is {V}, not a multiple of {columns}, as a {state.dtype} state needs"
    if state.stride(3) != 1 or state.stride(2) != V or q.stride(3) != 1 or k.stride(3) != 1:
        return "the last dims of q, k or state are not contiguous"
    if not (_reachable(v) and _reachable(state)):
        return f"v or state is not 16-byte aligned: strides {v.stride()} and {state.stride()}"
    return cubin.why_not_device(q.get_device()) or cubin.why_not_native()


def _warpgroups(K: int, V: int, chains: int, device: int) -> int:
    """Of a block, each with 64 columns of V: two share keys and queries where one alone would leave none idle."""
    blocks = V // _COLUMNS * chains
    return 2 if K <= 128 and V % (2 * _COLUMNS) == 0 and blocks > _multiprocessors(device) else 1


def _segments(chunks: int, sequences: int, blocks: int, device: int) -> int:
    """Parts that a sequence is cut into, as many as fill the multiprocessors that one block a chain leaves idle."""
    idle = _multiprocessors(device) // blocks
    return max(1, min(_MAX_SEGMENTS, idle, chunks // sequences // _LEAST_SEGMENT))


def _reachable(tensor: Tensor) -> bool:
    steps = [step for step, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    aligned = all(step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)
    return tensor.stride(3) == 1 and aligned and tensor.data_ptr() % _ALIGNMENT == 0


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _kernels(device: int, dtype: torch.dtype, K: int, warpgroups: int, source: str | None) -> tuple["Kernel", "Kernel"]:
    spec = cubin.Spec("gated_delta_rule", (("T", _TYPES[dtype]), ("K", K), ("WG", warpgroups)))
    inverse_bytes, output_bytes = cubin.native().gated_delta_rule_shared_bytes(K, warpgroups)
    inverse, output = "gated_delta_rule_fwd_kernel_inverse", "gated_delta_rule_fwd_kernel_o"
    return (
        cubin.load(spec, inverse, device, shared_bytes=inverse_bytes, source=source),
        cubin.load(spec, output, device, shared_bytes=output_bytes, source=source),
    )


@functools.cache
def _step_kernel(
    device: int, dtype: torch.dtype, state: torch.dtype, gates: torch.dtype, K: int, source: str | None
) -> "Kernel":
    types = (("T", _STEP_TYPES[dtype]), ("S", _STEP_TYPES[state]), ("W", _STEP_TYPES[gates]))
    spec = cubin.Spec("gated_delta_rule", (*types, ("K", K)), "step")
    return cubin.load(spec, "gated_delta_rule_fwd_kernel_step", device, source=source)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
