"""The chunked kernels of the CUDA backend: which inputs they take, and their launches on the current stream.

docs/gated_delta_rule.md has what each kernel computes. The backward recomputes what the forward made, so autograd keeps
nothing but the inputs.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.common import chunk_inputs
from hylo_ops.gated_delta_rule import cuda_inputs

if TYPE_CHECKING:
    from hylo_ops._C import GatedDeltaRuleShare, Kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_HALF_ULP_BITS = {torch.bfloat16: 9, torch.float16: 12}
_COLUMNS = 64  # of V, each chain's
_MAX_SEGMENTS = 32
_LEAST_SEGMENT = 4  # chunks
_WARM_UP = 2  # chunks that a segment of fast gates runs before it counts
_MANY_BLOCKS = 1.1  # so many times the blocks must reach the multiprocessors: solving pays from 120 of 132 on
_SOLVING_CUTS = 3  # segments of a cut sequence from which on solving pays, which takes twice as long for a chunk
_MAKERS = {"o": 2, "states": 3}  # blocks, of each head and sequence, that make records as fast as the pass takes them
_UNITS = {
    "cuts": "kernel",
    "inverse": "kernel",
    "o": "kernel",
    "solving_o": "solving",
    "states": "backward",
    "solving_states": "solving",
    "dstates": "dstates",
    "gradients": "gradients",
}


_FORWARD = ("cuts", "inverse", "o", "solving_o")


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
        return cuda_inputs.width(self.K)

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
        N = chunk_inputs.sequences(B, cu_seqlens)
        self.sizes = sizes = _Sizes(B, T, G, H, K, V, N, chunk_inputs.most_chunks(B, T, cu_seqlens))
        self.device, self.dtype, self.source = q.get_device(), q.dtype, source
        self.multiprocessors = _multiprocessors(self.device)
        segments = 1 if fixed_split else _segments(sizes, self.multiprocessors)
        self.first_pass = "states" if leaves_records else "o"
        self.shares = _shares(sizes, self.first_pass, segments, self.multiprocessors, fixed_split)
        self.cuts = segments > 1 and (leaves_records or any(share.pieces > 1 for share in self.shares))
        native = cubin.native()
        records = ready = cuts = None
        if leaves_records or not all(share.solving for share in self.shares):
            records = q.new_empty((sizes.chunks, H, native.GATED_DELTA_RULE_RECORD_BYTES), dtype=torch.uint8)
        if any(share.makers for share in self.shares):
            flags = q.new_empty if self.cuts else q.new_zeros  # the kernel that finds cuts clears them
            ready = flags((sizes.chunks, H), dtype=torch.int32)
        if self.cuts:
            cuts = q.new_empty((N, H, segments, 2), dtype=torch.int32)
        g, beta = g.float().contiguous(), beta.float().contiguous()
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.kept = records, ready, cuts, g, beta, bounds  # until the last launch
        self.native = native.GatedDeltaRuleChunkCall(
            q.data_ptr(),
            k.data_ptr(),
            g.data_ptr(),
            beta.data_ptr(),
            chunk_inputs.pointer(bounds),
            chunk_inputs.pointer(records),
            chunk_inputs.pointer(ready),
            chunk_inputs.pointer(cuts),
            sizes[:7],
            q.stride(),
            k.stride(),
            sizes.width,
            sizes.chunks,
            segments,
            scale,
            -(_HALF_ULP_BITS[q.dtype] + 1) * math.log(2),
            chunk_inputs.stream(self.device),
        )

    def kernel(self, name: str, chains: int = 1) -> "Kernel":
        return _kernel(self.device, self.dtype, self.sizes.width, chains, name, self.source)

    def outputs(self, *tensors: Any) -> None:
        self._run(self.native.outputs, *tensors)

    def states(self, *tensors: Any) -> None:
        self._run(self.native.states, *tensors)

    def _run(self, first_pass: Callable[..., None], *tensors: Any) -> None:
        """The first pass, and before it what it needs: where segments start, and the records that it does not make."""
        if self.cuts:
            self.native.cuts(self.kernel("cuts"))
        for share in self.shares:
            if not share.solving and (share.makers == 0 or share.pieces > 1):
                self.native.inverse(self.kernel("inverse"), self.multiprocessors, share)
        for share in self.shares:
            first_pass(self.kernel(("solving_" if share.solving else "") + self.first_pass), share, *tensors)

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
        call.outputs(
            v.data_ptr(), v.stride(), chunk_inputs.pointer(initial_state), o.data_ptr(), final_state.data_ptr()
        )
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
        call.states(*values, chunk_inputs.pointer(first_state), h.data_ptr(), written.data_ptr())
        results = dh.data_ptr(), dx.data_ptr(), chunk_inputs.pointer(d_initial_state)
        call.dstates(d_o.data_ptr(), d_final_state.data_ptr(), *results)
        call.gradients(*values, *(x.data_ptr() for x in (d_o, h, dh, written, dx, dq, dk, dv, dg, dbeta)))
    return (dg[0], dbeta[0]) if parts == 1 else (dg.sum(0), dbeta.sum(0))


def why_not(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, **_: Any
) -> str | None:
    """The reason why these kernels cannot take the inputs, or None. Shapes are taken to be the op's."""
    if q.dtype not in _TYPES:
        return f"q is {q.dtype}, not bfloat16 or float16"
    return cuda_inputs.why_not(q, k, v, initial_state) or _why_no_code(q.dtype, cuda_inputs.width(q.shape[3]))


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


@functools.cache
def _shares(
    sizes: _Sizes, first_pass: str, segments: int, multiprocessors: int, fixed_split: bool
) -> tuple["GatedDeltaRuleShare", ...]:
    """The launches that the first pass, "o" or "states", is shared out to.

    A pass that solves is the faster one where its blocks leave no multiprocessor idle, as those of many sequences and
    heads do, or of segments; whether a sequence can be cut only the device finds out. Otherwise idle ones make the
    records while the pass waits for each, or, where too few are idle, they are made before it.
    """
    share = cubin.native().GatedDeltaRuleShare
    can_solve = cubin.native().gated_delta_rule_can_solve(sizes.width) and not fixed_split
    makers = _makers(sizes, _MAKERS[first_pass], multiprocessors)
    if can_solve and _MANY_BLOCKS * sizes.blocks >= multiprocessors:
        return (share(True, "all", segments, 0),)
    if segments == 1 or (can_solve and makers and segments < _SOLVING_CUTS):
        return (share(False, "all", 1, makers),)
    if can_solve:
        return share(True, "cuttable", segments, 0), share(False, "uncuttable", 1, makers)
    return (share(False, "all", segments, makers),)


def _makers(sizes: _Sizes, wanted: int, multiprocessors: int) -> int:
    """Blocks of each head that make the records beside the pass: none where less than two for each sequence fit."""
    idle = max(0, multiprocessors - sizes.blocks) // sizes.H
    makers = min(idle, wanted * sizes.N)
    return makers if sizes.chunks and makers >= 2 * sizes.N else 0


@functools.cache
def _compile(dtype: torch.dtype, width: int, source: str | None) -> None:
    """Compiles all units of a width at once where none are packaged; one by one they take three times as long."""
    can_solve = cubin.native().gated_delta_rule_can_solve(width)
    units = [unit for unit in dict.fromkeys(_UNITS.values()) if can_solve or unit != "solving"]
    cubin.compile_missing([_spec(dtype, width, 1, unit) for unit in units], source)


@functools.cache
def _kernel(device: int, dtype: torch.dtype, width: int, chains: int, name: str, source: str | None) -> "Kernel":
    _compile(dtype, width, source)
    direction = "fwd" if name in _FORWARD else "bwd"
    shared = cubin.native().gated_delta_rule_chunk_shared_bytes(name, width, chains)
    symbol = f"gated_delta_rule_{direction}_kernel_{name}"
    return cubin.load(_spec(dtype, width, chains, _UNITS[name]), symbol, device, shared_bytes=shared, source=source)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
