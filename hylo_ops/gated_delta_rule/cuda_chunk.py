"""The chunked kernels of the CUDA backend: which inputs they take, and their launches on the current stream.

docs/gated_delta_rule.md has what each kernel computes. The backward recomputes what the forward made, so autograd keeps
nothing but the inputs.
"""

import concurrent.futures
import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hylo_ops import cubin

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_HALF_ULP_BITS = {torch.bfloat16: 9, torch.float16: 12}
_WIDTHS = (64, 128, 256)  # kernels are compiled for; a head of another width runs in the next wider one's
_STEP = 16  # of widths
_CHUNK = 64  # kChunk of csrc/gated_delta_rule/traits.cuh
_COLUMNS = 64  # of V, each chain's
_MAX_SEGMENTS = 32
_LEAST_SEGMENT = 4  # chunks
_WARM_UP = 2  # chunks that a segment of fast gates runs before it counts
_MANY_BLOCKS = 1.1  # so many times the blocks must reach the multiprocessors: solving pays from 120 of 132 on
_ALIGNMENT = 16  # bytes, of what the copy engine reads
_UNITS = {
    "cuts": "kernel",
    "inverse": "kernel",
    "o": "kernel",
    "solving_o": "kernel",
    "states": "backward",
    "solving_states": "backward",
    "dstates": "dstates",
    "gradients": "gradients",
}


class _Sizes(NamedTuple):
    B: int
    T: int
    G: int
    H: int
    K: int
    V: int
    N: int
    chunks: int  # of all sequences; for packed ones a bound

    @property
    def width(self) -> int:
        return _width(self.K)

    @property
    def columns(self) -> int:
        return -(-self.V // _COLUMNS)

    @property
    def blocks(self) -> int:
        """Of a pass, if no sequence is cut and each has one chain."""
        return self.columns * self.H * self.N


class _Call:
    """One call of the op: its geometry, what its kernels share, and their launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
        fixed_split: bool,
        source: str | None,
        *,
        leaves_records: bool,
    ):
        (B, T, G, K), (H, V) = q.shape, v.shape[2:]
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunks = B * -(-T // _CHUNK) if cu_seqlens is None else T // _CHUNK + N  # no sequence leaves two unfilled
        self.sizes = sizes = _Sizes(B, T, G, H, K, V, N, chunks if T else 0)
        self.device, self.dtype, self.source = q.get_device(), q.dtype, source
        self.multiprocessors = _multiprocessors(self.device)
        segments = 1 if fixed_split else _segments(sizes, self.multiprocessors)
        native = cubin.native()
        # A pass that solves is the faster one where its blocks leave no multiprocessor idle. Of sequences that are cut
        # into segments they do so if the gates let it, which the device finds out.
        can_solve = native.gated_delta_rule_can_solve(sizes.width) and not fixed_split
        fills = _MANY_BLOCKS * sizes.blocks >= self.multiprocessors
        self.solving = can_solve and (segments > 1 or fills)
        self.plain = not (can_solve and fills)
        records = cuts = None
        if leaves_records or self.plain:
            records = q.new_empty((sizes.chunks, H, native.GATED_DELTA_RULE_RECORD_BYTES), dtype=torch.uint8)
        if segments > 1:
            cuts = q.new_empty((N, H, segments, 2), dtype=torch.int32)
        g, beta = g.float().contiguous(), beta.float().contiguous()
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.kept = records, cuts, g, beta, bounds  # until the last launch
        self.native = native.GatedDeltaRuleChunkCall(
            q.data_ptr(),
            k.data_ptr(),
            g.data_ptr(),
            beta.data_ptr(),
            _pointer(bounds),
            _pointer(records),
            _pointer(cuts),
            sizes[:7],
            q.stride(),
            k.stride(),
            sizes.width,
            sizes.chunks,
            segments,
            self.solving and self.plain,
            scale,
            -(_HALF_ULP_BITS[q.dtype] + 1) * math.log(2),
            torch._C._cuda_getCurrentRawStream(self.device),
        )
        if segments > 1:
            self.native.cuts(self.kernel("cuts"))
        if self.plain:
            self.native.inverse(self.kernel("inverse"), self.multiprocessors)

    def kernel(self, name: str, chains: int = 1) -> "Kernel":
        return _kernel(self.device, self.dtype, self.sizes.width, chains, name, self.source)

    def outputs(self, *tensors: Any) -> None:
        if self.solving:
            self.native.outputs(self.kernel("solving_o"), True, *tensors)
        if self.plain:
            self.native.outputs(self.kernel("o"), False, *tensors)

    def states(self, *tensors: Any) -> None:
        if self.solving:
            self.native.states(self.kernel("solving_states"), True, *tensors)
        if self.plain:
            self.native.states(self.kernel("states"), False, *tensors)

    def dstates(self, *tensors: Any) -> None:
        chains = _chains(self.sizes, self.multiprocessors)
        self.native.dstates(self.kernel("dstates", chains), chains, *tensors)

    def gradients(self, *tensors: Any) -> None:
        self.native.gradients(self.kernel("gradients"), self.multiprocessors, *tensors)


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
    """`chunk_gated_delta_rule` for inputs that `why_not` lets pass.

    Never synchronises. The first call of a shape loads its kernels, which a CUDA graph cannot capture.

    Args:
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    call = _Call(q, k, v, g, beta, cu_seqlens, scale, fixed_split, cubin_source, leaves_records=False)
    sizes = call.sizes
    initial_state = None if initial_state is None else initial_state.float().contiguous()
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = q.new_empty((sizes.N, sizes.H, sizes.K, sizes.V), dtype=torch.float32)
    if final_state.numel():
        call.outputs(v.data_ptr(), v.stride(), _pointer(initial_state), o.data_ptr(), final_state.data_ptr())
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
    d_o, d_final_state = grads[0].to(q.dtype).contiguous(), grads[1].float().contiguous()
    call = _Call(q, k, v, g, beta, cu_seqlens, scale, fixed_split, cubin_source, leaves_records=True)
    first_state = None if initial_state is None else initial_state.float().contiguous()
    d_initial_state = None if first_state is None else torch.empty_like(first_state)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    found += _token_gradients(call, v, first_state, d_o, d_final_state, d_initial_state, *found)
    found[3:] = found[3].to(g.dtype), found[4].to(beta.dtype)
    if initial_state is None or d_initial_state is None:
        return found
    return [*found, d_initial_state.to(initial_state.dtype)]


def _token_gradients(
    call: _Call,
    v: Tensor,
    first_state: Tensor | None,
    d_o: Tensor,
    d_final_state: Tensor,
    d_initial_state: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> tuple[Tensor, Tensor]:
    """dg and dbeta in fp32; fills d_initial_state, dq, dk and dv."""
    sizes = call.sizes
    h = v.new_empty(sizes.chunks, sizes.H, sizes.K, sizes.V)
    written = v.new_empty(v.shape)
    dh, dx = torch.empty_like(h), torch.empty_like(written)
    parts = cubin.native().gated_delta_rule_gradients_parts(sizes.width)
    dg = v.new_empty((parts, sizes.B, sizes.T, sizes.H), dtype=torch.float32)
    dbeta = torch.empty_like(dg)
    if d_final_state.numel():
        values = v.data_ptr(), v.stride()
        call.states(*values, _pointer(first_state), h.data_ptr(), written.data_ptr())
        results = dh.data_ptr(), dx.data_ptr(), _pointer(d_initial_state)
        call.dstates(d_o.data_ptr(), d_final_state.data_ptr(), *results)
        call.gradients(*values, *(x.data_ptr() for x in (d_o, h, dh, written, dx, dq, dk, dv, dg, dbeta)))
    return (dg[0], dbeta[0]) if parts == 1 else (dg.sum(0), dbeta.sum(0))


def why_not(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, **_: Any
) -> str | None:
    """The reason why these kernels cannot take the inputs, or None. Shapes are taken to be the op's."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if q.dtype not in _TYPES:
        return f"q is {q.dtype}, not bfloat16 or float16"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of one dtype"
    if initial_state is not None and initial_state.dtype == torch.float64:
        return "the state is float64"
    K, V = q.shape[3], v.shape[3]
    if K % _STEP or not 0 < K <= _WIDTHS[-1]:
        return f"K is {K}, not a multiple of {_STEP} up to {_WIDTHS[-1]}"
    if V % _STEP or not V:
        return f"V is {V}, not a multiple of {_STEP}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not _reachable(tensor):
            return f"the copy engine cannot read {name}: strides {tensor.stride()} or its start are not 16-byte aligned"
    return cubin.why_not_device(q.get_device()) or _why_no_code(q.dtype, _width(K))


def _width(K: int) -> int:
    return next(width for width in _WIDTHS if width >= K)


def _spec(dtype: torch.dtype, width: int, chains: int, unit: str) -> cubin.Spec:
    dims = (("T", _TYPES[dtype]), ("K", width)) + ((("CHAINS", chains),) if unit == "dstates" else ())
    return cubin.Spec("gated_delta_rule", dims, unit)


@functools.cache
def _why_no_code(dtype: torch.dtype, width: int) -> str | None:
    """The reason why nothing can be launched here. One cubin stands for all of a width: they are packaged together."""
    return cubin.why_not_native() or cubin.why_not(_spec(dtype, width, 1, "kernel"))


def _chains(sizes: _Sizes, multiprocessors: int) -> int:
    """Of a block, each with 64 columns of V: two share keys and queries where one alone would leave none idle."""
    return 2 if sizes.width <= 128 and sizes.columns % 2 == 0 and sizes.blocks > multiprocessors else 1


@functools.cache
def _segments(sizes: _Sizes, multiprocessors: int) -> int:
    """Parts that a sequence is cut into: as many as end soonest, if gates are fast and blocks run in full waves."""
    chunks = sizes.chunks // max(1, sizes.N)

    def chunks_run(segments: int) -> int:
        waves = -(-sizes.blocks * segments // multiprocessors)
        return waves * (-(-chunks // segments) + (_WARM_UP if segments > 1 else 0))

    most = max(1, min(_MAX_SEGMENTS, chunks // _LEAST_SEGMENT))
    return min(range(1, most + 1), key=chunks_run)


def _reachable(tensor: Tensor) -> bool:
    steps = [step for step, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if size > 1]
    aligned = all(step * tensor.element_size() % _ALIGNMENT == 0 for step in steps)
    return tensor.stride(3) == 1 and aligned and tensor.data_ptr() % _ALIGNMENT == 0


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.cache
def _compile(dtype: torch.dtype, width: int, source: str | None) -> None:
    """Compiles all units of a width at once where none are packaged; one by one they take three times as long."""
    listed = [_spec(dtype, width, 1, unit) for unit in dict.fromkeys(_UNITS.values())]
    missing = [spec for spec in listed if source == "nvrtc" or not cubin.packaged_path(spec).exists()]
    if missing and source != "packaged":
        with concurrent.futures.ThreadPoolExecutor(len(missing)) as threads:
            list(threads.map(functools.partial(cubin.device_code, source=source), missing))


@functools.cache
def _kernel(device: int, dtype: torch.dtype, width: int, chains: int, name: str, source: str | None) -> "Kernel":
    _compile(dtype, width, source)
    unit = _UNITS[name]
    direction = "fwd" if unit == "kernel" else "bwd"
    shared = cubin.native().gated_delta_rule_chunk_shared_bytes(name, width, chains)
    symbol = f"gated_delta_rule_{direction}_kernel_{name}"
    return cubin.load(_spec(dtype, width, chains, unit), symbol, device, shared_bytes=shared, source=source)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
