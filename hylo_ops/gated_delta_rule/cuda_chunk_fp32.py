"""The chunked kernels of the CUDA backend for fp32: which inputs they take, and their launches on the current stream.

Plain fp32 products on the CUDA cores; docs/gated_delta_rule.md has what each kernel computes. The backward recomputes
what the forward made, so autograd keeps nothing but the inputs.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.common import chunk_inputs
from hylo_ops.common.chunk_inputs import CHUNK
from hylo_ops.gated_delta_rule import cuda_inputs

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

_SLICE = 64  # kSlice of csrc/gated_delta_rule/fp32_traits.cuh
_RECORD = 2 * CHUNK * CHUNK + 5 * CHUNK  # kRecordLength there
_MAX_GRID = 65535
_UNITS = {
    "inverse": "fp32_forward",
    "o": "fp32_forward",
    "states": "fp32_backward",
    "dstates": "fp32_backward",
    "dscores": "fp32_backward",
    "dqk": "fp32_backward",
}


class _Call:
    """One call of the op: what its kernels share, and the records of all its chunks, which are made here."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        source: str | None,
    ):
        (B, T, G, K), (H, V) = q.shape, v.shape[2:]
        N = chunk_inputs.sequences(B, cu_seqlens)
        self.chunks = chunk_inputs.most_chunks(B, T, cu_seqlens)
        self.device, self.width, self.source = q.get_device(), cuda_inputs.width(K), source
        records = q.new_empty((self.chunks, H, _RECORD))
        g, beta = g.float().contiguous(), beta.float().contiguous()
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.kept = records, g, beta, bounds  # until the last launch
        self.native = cubin.native().GatedDeltaRuleFp32Call(
            (q.data_ptr(), k.data_ptr(), v.data_ptr()),
            g.data_ptr(),
            beta.data_ptr(),
            chunk_inputs.pointer(bounds),
            records.data_ptr(),
            (B, T, G, H, K, V, N),
            (q.stride(), k.stride(), v.stride()),
            self.chunks,
            scale,
            chunk_inputs.stream(self.device),
        )
        self.native.inverse(self.kernel("inverse"))

    def kernel(self, name: str) -> "Kernel":
        return _kernel(self.device, self.width, name, self.source)


def forward(
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
    """`chunk_gated_delta_rule` for inputs that `why_not` lets pass. No sequence is ever split, as `fixed_split` asks.

    Never synchronises. The first call of a shape loads its kernels, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    N = chunk_inputs.sequences(v.shape[0], cu_seqlens)
    final_state = q.new_empty((N, v.shape[2], q.shape[3], v.shape[3]))
    if final_state.numel():
        call = _Call(q, k, v, g, beta, cu_seqlens, scale, cubin_source)
        first_state = None if initial_state is None else initial_state.float().contiguous()
        call.native.outputs(call.kernel("o"), chunk_inputs.pointer(first_state), o.data_ptr(), final_state.data_ptr())
    return o, final_state


def backward(
    grads: list[Tensor],
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
) -> list[Tensor]:
    """Gradients of q, k, v, g, beta and, where given, initial_state, in their dtypes; as `forward` otherwise.

    Args:
        grads: gradients of o and of final_state.
    """
    d_o, d_final_state = (grad.float().contiguous() for grad in grads)
    first_state = None if initial_state is None else initial_state.float().contiguous()
    d_initial_state = None if first_state is None else torch.empty_like(first_state)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    (H, V), K = v.shape[2:], q.shape[3]
    dg = q.new_empty((1 + -(-K // _SLICE), *v.shape[:3]))
    dbeta = torch.empty_like(dg)
    if d_final_state.numel():
        call = _Call(q, k, v, g, beta, cu_seqlens, scale, cubin_source)
        h, d_scores = q.new_empty((call.chunks, H, K, V)), q.new_empty((call.chunks, H, CHUNK, CHUNK))
        dh, d_solve = torch.empty_like(h), torch.empty_like(d_scores)
        written, dx = torch.empty_like(dv), torch.empty_like(dv)
        call.native.share(*(x.data_ptr() for x in (d_o, h, dh, written, dx, d_scores, d_solve)))
        call.native.states(call.kernel("states"), chunk_inputs.pointer(first_state))
        call.native.dstates(call.kernel("dstates"), d_final_state.data_ptr(), chunk_inputs.pointer(d_initial_state))
        gates = dg.data_ptr(), dbeta.data_ptr()
        call.native.dscores(call.kernel("dscores"), dv.data_ptr(), *gates)
        call.native.dqk(call.kernel("dqk"), dq.data_ptr(), dk.data_ptr(), *gates)
    found = [dq, dk, dv, dg.sum(0).to(g.dtype), dbeta.sum(0).to(beta.dtype)]
    if initial_state is None or d_initial_state is None:
        return found
    return [*found, d_initial_state.to(initial_state.dtype)]


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> str | None:
    """The reason why these kernels cannot take the inputs, or None. Shapes are taken to be the op's."""
    if q.dtype != torch.float32:
        return f"q is {q.dtype}, not float32"
    if max(v.shape[2], chunk_inputs.sequences(v.shape[0], cu_seqlens)) > _MAX_GRID:
        return f"there are more than {_MAX_GRID} sequences or heads"
    return cuda_inputs.why_not(q, k, v, initial_state) or _why_no_code(cuda_inputs.width(q.shape[3]))


def _spec(width: int, unit: str) -> cubin.Spec:
    return cubin.Spec("gated_delta_rule", (("K", width),), unit)


@functools.cache
def _why_no_code(width: int) -> str | None:
    """The reason why nothing can be launched here. One cubin stands for both of a width: they are packaged together."""
    return cubin.why_not_native() or cubin.why_not(_spec(width, "fp32_forward"))


@functools.cache
def _compile(width: int, source: str | None) -> None:
    """Compiles both units of a width at once where they are not packaged."""
    cubin.compile_missing([_spec(width, unit) for unit in dict.fromkeys(_UNITS.values())], source)


@functools.cache
def _kernel(device: int, width: int, name: str, source: str | None) -> "Kernel":
    _compile(width, source)
    unit = _UNITS[name]
    direction = "fwd" if unit == "fp32_forward" else "bwd"
    shared = cubin.native().gated_delta_rule_fp32_shared_bytes(name, width)
    symbol = f"gated_delta_rule_{direction}_kernel_fp32_{name}"
    return cubin.load(_spec(width, unit), symbol, device, shared_bytes=shared, source=source)
