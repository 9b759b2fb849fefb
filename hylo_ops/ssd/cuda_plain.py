"""The chunked kernels of the CUDA backend on CUDA cores, for every type and width: which inputs they take, and their
launches on the current stream.

Plain fp32 products; docs/ssd.md has what each kernel computes. The backward recomputes the states, so autograd keeps
nothing but the inputs.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.common import chunk_inputs
from hylo_ops.ssd import cuda_inputs

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_UNITS = {
    "factors": "plain_forward",
    "ends": "plain_forward",
    "carry": "plain_forward",
    "o": "plain_forward",
    "dx": "plain_backward",
    "db": "plain_backward",
    "dc": "plain_backward",
    "ddt": "plain_backward",
    "vectors": "plain_backward",
}
_FORTH, _BACK = 0, 1  # Direction of csrc/ssd/params.h


class _Call:
    """One call of the op: its geometry, what its kernels share, and their launches; the factors are made here."""

    def __init__(
        self,
        source: str | None,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        dt_softplus: bool,
        dt_limit: Sequence[float] | None,
        fixed_split: bool,
    ):
        (B, T, HX, V), (GB, K), G, self.heads = x.shape, b.shape[2:], c.shape[2], dt.shape[2]
        N = chunk_inputs.sequences(B, cu_seqlens)
        self.chunks = chunk_inputs.most_chunks(B, T, cu_seqlens)
        self.device, self.dtype, self.source = x.get_device(), x.dtype, source
        self.states_shape, self.final_shape = (self.chunks, self.heads, V, K), (N, self.heads, V, K)
        factors = self._floats(x, self.chunks, self.heads, cubin.native().ssd_plain_factors_length())
        self.first_state = None if initial_state is None else initial_state.float().contiguous()
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.kept = [factors, bounds]  # until the last launch
        least, greatest = (-math.inf, math.inf) if dt_limit is None else dt_limit
        self.native = cubin.native().SsdPlainCall(
            [t.data_ptr() for t in (x, b, c)],
            [t.stride() for t in (x, b, c)],
            cuda_inputs.of_tokens(dt),
            cuda_inputs.of_heads(a),
            cuda_inputs.of_heads(d),
            cuda_inputs.of_heads(dt_bias),
            chunk_inputs.pointer(bounds),
            (B, T, HX, GB, G, self.heads, V, K, N),
            self.chunks,
            factors.data_ptr(),
            dt_softplus,
            least,
            greatest,
            chunk_inputs.stream(self.device),
        )
        if math.prod(self.final_shape):
            self.native.factors(self.kernel("factors"))

    def kernel(self, name: str) -> "Kernel":
        return _kernel(self.device, self.dtype, name, self.source)

    def states(self, like: Tensor, given: Sequence[Tensor | None], left: Sequence[Tensor | None]) -> None:
        """In as many directions as there are entries: from what sequences are given, also to what they leave."""
        room = self._floats(like, len(given), *self.states_shape)
        for direction, (first, last) in enumerate(zip(given, left, strict=True)):
            pointers = (chunk_inputs.pointer(t) for t in (room[direction], first, last))
            self.native.set_states(direction, *pointers)
        self.native.states(self.kernel("ends"), self.kernel("carry"), len(given))
        self.kept.append(room)

    def gradients(self, dx: Tensor, ddt: Tensor, db: Tensor, dc: Tensor, parts: Tensor) -> None:
        sums = self._floats(dx, self.chunks, self.heads, cubin.native().ssd_plain_sums_length(*self.final_shape[2:]))
        kernels = [self.kernel(name) for name in ("dx", "db", "dc")]
        self.native.gradients(kernels, [t.data_ptr() for t in (dx, db, dc)], sums.data_ptr())
        self.native.ddt(self.kernel("ddt"), ddt.data_ptr(), parts.data_ptr())

    @staticmethod
    def _floats(like: Tensor, *shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.float32)


def forward(*inputs: Any, cubin_source: str | None = None) -> tuple[Tensor, Tensor]:
    """`chunk_ssd` for inputs that `why_not` lets pass. No sequence is ever split, as `fixed_split` asks.

    Never synchronises. The first call of a type loads its kernels, which a CUDA graph cannot capture.

    Args:
        inputs: the op's, in its order, without the backend.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    x, dt = inputs[:2]
    call = _Call(cubin_source, *inputs)
    o = x.new_empty((*dt.shape, x.shape[3]))
    final_state = x.new_empty(call.final_shape, dtype=torch.float32)
    if final_state.numel():
        call.states(x, [call.first_state], [final_state])
        call.native.outputs(call.kernel("o"), o.data_ptr())
    return o, final_state


def backward(grads: list[Tensor], *inputs: Any, cubin_source: str | None = None) -> list[Tensor]:
    """Gradients of x, dt, a, b, c and, where given, d, dt_bias and initial_state, in their dtypes; as `forward`
    otherwise.

    Args:
        grads: gradients of o and of final_state.
        inputs: the op's, in its order, without the backend.
    """
    x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens = inputs[:9]
    d_o, d_final_state = grads[0].to(x.dtype).contiguous(), grads[1].float().contiguous()
    call = _Call(cubin_source, *inputs)
    dx, ddt, db, dc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, b, c))
    parts = cuda_inputs.room_for_parts(x, call.chunks, call.heads, cu_seqlens)
    d_initial_state = None if initial_state is None else torch.empty_like(d_final_state)
    if d_final_state.numel():
        call.native.set_gradient(d_o.data_ptr())
        call.states(x, [call.first_state, d_final_state], [None, d_initial_state])
        call.gradients(dx, ddt, db, dc, parts)
    *others, da = cuda_inputs.sum_parts(call.native, call.kernel("vectors"), parts, (d, dt_bias, a))
    if d_initial_state is not None:
        d_initial_state = d_initial_state.to(initial_state.dtype)
    return [result for result in (dx, ddt, da, db, dc, *others, d_initial_state) if result is not None]


def why_not(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, **_: Any) -> str | None:
    """The reason why these kernels cannot take the inputs, or None. Shapes are taken to be the op's."""
    if x.dtype not in TYPES:
        return f"x is {x.dtype}, not bfloat16, float16 or float32"
    if dt.shape[2] > cuda_inputs.MAX_GRID:
        return f"there are {dt.shape[2]} heads, more than {cuda_inputs.MAX_GRID}"
    return cuda_inputs.why_not(x, b, c, initial_state) or _why_no_code(x.dtype)


def spec(dtype: str, unit: str) -> cubin.Spec:
    """One of the kernels' files for a type by the build's names."""
    return cubin.Spec("ssd", (("T", dtype),), unit)


@functools.cache
def _why_no_code(dtype: torch.dtype) -> str | None:
    """The reason why nothing can be launched here. One cubin stands for both of a type: they are packaged together."""
    return cubin.why_not_native() or cubin.why_not(spec(TYPES[dtype], "plain_forward"))


@functools.cache
def _compile(dtype: torch.dtype, source: str | None) -> None:
    """Compiles both units of a type at once where they are not packaged."""
    cubin.compile_missing([spec(TYPES[dtype], unit) for unit in dict.fromkeys(_UNITS.values())], source)


@functools.cache
def _kernel(device: int, dtype: torch.dtype, name: str, source: str | None) -> "Kernel":
    _compile(dtype, source)
    unit = _UNITS[name]
    symbol = f"ssd_{'fwd' if unit == 'plain_forward' else 'bwd'}_kernel_plain_{name}"
    shared = cubin.native().ssd_plain_shared_bytes(name)
    return cubin.load(spec(TYPES[dtype], unit), symbol, device, shared_bytes=shared, source=source)
