"""The chunked kernels of the CUDA backend on tensor cores: which inputs they take, and their launches on the current
stream.

docs/ssd.md has what each kernel computes. The backward recomputes the states; autograd keeps nothing but the inputs
and, of a sequence that is cut into pieces, the states these begin with.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hylo_ops import cubin
from hylo_ops.common import chunk_inputs
from hylo_ops.ssd import cuda_inputs

if TYPE_CHECKING:
    from hylo_ops._C import Kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_WIDTHS = (64, 128, 256)  # of K that kernels are compiled for; a head of another width runs in the next wider one's
_COLUMNS = 64  # of V, each chain's
_MAX_PIECES = 64
_LEAST_PIECE = 4  # chunks
_START = 2  # chunks that a block could have done before its first one is there
_CUT_COST = 1.4  # of a walk with outputs, one without them before it included
_VALUES = (64, 128)  # of V that the gradients' kernel is compiled for
_MOST_BACK = 128  # of V and K
_MOST_MIXED = 128  # of K, where the convolution is made in the same kernel, and its taps
_MOST_TAPS = 4
_MOST_STATES = 64 << 20  # bytes of them that the backward has at a time, or twice what o takes
_UNITS = {
    "ends": "kernel",
    "mix": "kernel",
    "mixed_ends": "kernel",
    "carry": "kernel",
    "o": "kernel",
    "states": "backward",
    "gradients": "gradients",
    "vectors": "backward",
}


Room = Sequence[Tensor]


class Mixing(NamedTuple):
    """A convolution with silu that makes x, b and c, which lie side by side.

    Args:
        raw: what it convolves, [B, T, D].   weight: [D, taps].   bias: [D] or None.
        mixed: room for what it makes, [B, T, D].   last_inputs: room for these, [B, D, taps].
    """

    raw: Tensor
    weight: Tensor
    bias: Tensor | None
    mixed: Tensor
    last_inputs: Tensor


class _Sizes(NamedTuple):
    B: int
    T: int
    HX: int
    GB: int
    G: int
    H: int
    V: int
    K: int
    N: int

    @property
    def width(self) -> int:
        return _width(self.K)

    @property
    def most_values(self) -> int:
        """Of the gradients' kernel that takes V."""
        return next(values for values in _VALUES if values >= self.V)

    @property
    def blocks(self) -> int:
        """Of a pass in one direction, if no sequence is cut."""
        return self.N * -(-self.H * -(-self.V // _COLUMNS) // cubin.native().ssd_chains(self.width))


class _Call:
    """One call of the op: its geometry, what its kernels share, and their launches."""

    def __init__(
        self,
        source: str | None,
        back: bool,
        states: Tensor | None,
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
        self.sizes = sizes = _sizes(x, dt, b, c, cu_seqlens)
        self.device, self.dtype, self.source, self.back = x.get_device(), x.dtype, source, back
        self.chunks = chunk_inputs.most_chunks(sizes.B, sizes.T, cu_seqlens)
        self.windows = _windows(sizes, self.chunks) if back else 1
        self.begun = states is not None and states.numel() > 0
        multiprocessors = _multiprocessors(self.device)
        if self.begun:
            assert states is not None
            self.pieces = states.shape[1]
            merged = _merged(sizes, self.chunks, self.windows, self.pieces, multiprocessors)
        else:
            directions = 2 if back else 1
            cut = sizes, self.chunks, directions, self.windows, multiprocessors
            self.pieces, merged = 1 if fixed_split else _pieces(*cut), 1
        # Room for what each piece adds, forth and back, which becomes what it begins with.
        self.ends: list[Tensor | None] = [states if self.begun else None, None]
        totals: list[Tensor | None] = [None, None]
        for direction in self.directions if self.pieces > 1 else ():
            self.ends[direction] = x.new_empty(_ends_shape(sizes, self.pieces), dtype=torch.float32)
            totals[direction] = x.new_empty((sizes.N, self.pieces, sizes.H), dtype=torch.float32)
        initial_state = None if initial_state is None else initial_state.float().contiguous()
        bounds = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.kept: tuple[Any, ...] = totals, bounds, initial_state  # until the last launch
        least, greatest = (-math.inf, math.inf) if dt_limit is None else dt_limit
        self.native = cubin.native().SsdChunkCall(
            [t.data_ptr() for t in (x, b, c)],
            [t.stride() for t in (x, b, c)],
            cuda_inputs.of_tokens(dt),
            cuda_inputs.of_heads(a),
            cuda_inputs.of_heads(d),
            cuda_inputs.of_heads(dt_bias),
            chunk_inputs.pointer(bounds),
            chunk_inputs.pointer(initial_state),
            sizes,
            sizes.width,
            self.chunks,
            self.pieces,
            merged,
            [chunk_inputs.pointer(t) for t in self.ends],
            [chunk_inputs.pointer(t) for t in totals],
            dt_softplus,
            least,
            greatest,
            chunk_inputs.stream(self.device),
        )

    def kernel(self, name: str) -> "Kernel":
        sizes = self.sizes
        values = sizes.most_values if name == "gradients" else None
        return _kernel(self.device, self.dtype, sizes.width, values, name, _shared_bytes(name, sizes), self.source)

    @property
    def directions(self) -> list[int]:
        """That it is still to be found out of what pieces begin with: forth (0), back (1)."""
        return [*([] if self.begun else [0]), *([1] if self.back else [])]

    def begin(self) -> None:
        """What each piece begins with."""
        self.native.begin(self.kernel("ends"), self.kernel("carry"), *(way in self.directions for way in (0, 1)))

    def mixed(self, mixing: Mixing) -> Any:
        """What the launchers want to know of it."""
        raw, weight = mixing.raw, mixing.weight.contiguous()
        self.kept = *self.kept, weight
        return cubin.native().SsdMixed(
            *(t.data_ptr() for t in (raw, mixing.mixed, mixing.last_inputs)),
            *raw.stride()[:2],
            raw.shape[2],
            cuda_inputs.of_heads(weight.view(-1)),
            cuda_inputs.of_heads(mixing.bias),
            weight.shape[1],
        )

    def begin_mixed(self, mixing: Mixing) -> None:
        """The same forth; and x, b and c first."""
        of = self.mixed(mixing)
        self.native.mix(self.kernel("mix"), of)
        self.native.begin_mixed(self.kernel("mixed_ends"), self.kernel("carry"), of)


def forward(
    *inputs: Any, save_states: bool = False, mixing: Mixing | None = None, cubin_source: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`chunk_ssd` for inputs that `why_not` lets pass; and the states that pieces of the sequences begin with,
    [N, pieces, H, V, K], or an empty tensor where these are not asked for or nothing is cut.

    Never synchronises. The first call of a shape loads its kernels, which a CUDA graph cannot capture.

    Args:
        inputs: the op's, in its order, up to fixed_split.
        mixing: what makes x, b and c, which are then views of room for it, for inputs that `mixing_why_not` lets pass.
        cubin_source: None | "packaged" | "nvrtc", as `hylo_ops.cubin.device_code` has it.
    """
    call = _Call(cubin_source, False, None, *inputs)
    x, sizes = inputs[0], call.sizes
    o = x.new_empty((sizes.B, sizes.T, sizes.H, sizes.V))
    final_state = x.new_empty((sizes.N, sizes.H, sizes.V, sizes.K), dtype=torch.float32)
    if final_state.numel():
        call.begin() if mixing is None else call.begin_mixed(mixing)
        call.native.outputs(call.kernel("o"), o.data_ptr(), final_state.data_ptr())
    states = call.ends[0] if save_states else None
    return o, final_state, x.new_empty(0, dtype=torch.float32) if states is None else states


def backward(
    grads: list[Tensor],
    *inputs: Any,
    states: Tensor | None = None,
    room: Room | None = None,
    cubin_source: str | None = None,
) -> list[Tensor]:
    """Gradients of x, dt, a, b, c and, where given, d, dt_bias and initial_state, in their dtypes; as `forward`
    otherwise.

    Args:
        grads: gradients of o and of final_state.
        inputs: the op's, in its order, up to fixed_split.
        states: that `forward` saved.
        room: for the gradients of x, b and c, of their shapes and dtype. Heads lie side by side; tokens and batch
            entries may lie further apart, by multiples of 8 elements.
    """
    x, dt, a, b, c, d, dt_bias, initial_state, cu_seqlens = inputs[:9]
    call = _Call(cubin_source, True, states, *inputs)
    sizes = call.sizes
    d_o, d_final_state = grads[0].to(x.dtype).contiguous(), grads[1].float().contiguous()
    call.native.set_gradients(d_o.data_ptr(), d_final_state.data_ptr())
    dx, db, dc = room or [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, b, c)]
    ddt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    parts = cuda_inputs.room_for_parts(x, call.chunks, sizes.H, cu_seqlens, call.native.owed_rows())
    d_initial_state = None if initial_state is None else torch.empty_like(d_final_state)
    if d_final_state.numel():
        call.begin()
        _run_windows(call, (dx, db, dc, ddt), parts, d_initial_state)
    *others, da = cuda_inputs.sum_parts(call.native, call.kernel("vectors"), parts, (d, dt_bias, a))
    if d_initial_state is not None:
        d_initial_state = d_initial_state.to(initial_state.dtype)
    return [result for result in (dx, ddt, da, db, dc, *others, d_initial_state) if result is not None]


def _run_windows(call: _Call, found: Sequence[Tensor], parts: Tensor, d_initial_state: Tensor | None) -> None:
    """States, and gradients of x, b, c and dt, one part of the heads after the other in the same room."""
    x, sizes, kernel = found[0], call.sizes, call.kernel
    states = x.new_empty((2, call.chunks, call.native.window_heads(call.windows), sizes.V, sizes.K))
    sums_so_far = None  # of db and dc, where windows go through the heads that share b or c
    if call.windows > 1 and 1 in (sizes.GB, sizes.G):
        sums_so_far = x.new_empty((2, call.chunks, _COLUMNS, sizes.width), dtype=torch.float32)
    places = [t.data_ptr() for t in found], [t.stride() for t in found[:3]]
    blocks = _multiprocessors(call.device)
    of_parts, of_sums = parts.data_ptr(), chunk_inputs.pointer(sums_so_far)
    for window in range(call.windows):
        at = window, call.windows, states[0].data_ptr(), states[1].data_ptr()
        call.native.states(kernel("states"), *at, chunk_inputs.pointer(d_initial_state), of_parts)
        call.native.gradients(kernel("gradients"), sizes.most_values, *at, *places, of_parts, of_sums, blocks)


def why_not(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, **_: Any
) -> str | None:
    """The reason why these kernels cannot take the inputs, or None. Shapes are taken to be the op's."""
    if x.dtype not in _TYPES:
        return f"x is {x.dtype}, not bfloat16 or float16"
    sequences = chunk_inputs.sequences(x.shape[0], cu_seqlens)
    if max(sequences, dt.shape[2]) > cuda_inputs.MAX_GRID:
        return f"there are {sequences} sequences and {dt.shape[2]} heads, more than {cuda_inputs.MAX_GRID}"
    return cuda_inputs.why_not(x, b, c, initial_state) or _why_no_code(x.dtype, _width(b.shape[3]))


def backward_why_not(x: Tensor, b: Tensor, **others: Any) -> str | None:
    """The same of `backward`."""
    if not has_room_back(x, b):
        return f"V and K are {x.shape[3]} and {b.shape[3]}, and this backward takes them up to {_MOST_BACK}"
    return why_not(x, b=b, **others)


def mixing_why_not(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, taps: int) -> str | None:
    """The reason why the convolution ahead of the scan is not made in one of its kernels, or None; of inputs that
    `why_not` lets pass."""
    sizes = _sizes(x, dt, b, c, cu_seqlens)
    if sizes.HX != sizes.H:
        return f"x has {sizes.HX} heads and dt {sizes.H}: each head of x would be convolved several times"
    if sizes.width > _MOST_MIXED:
        return f"K is {sizes.K}, more than {_MOST_MIXED}"
    if taps > _MOST_TAPS:
        return f"the convolution has {taps} taps, more than {_MOST_TAPS}"
    if cu_seqlens is not None:
        return "sequences are packed"
    if len(saved_shape(x, dt, b, c, cu_seqlens, False)) == 1:
        return "no sequence is cut: x is read once"
    return None


def saved_shape(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None, fixed_split: bool
) -> tuple[int, ...]:
    """Of the states that `forward` saves."""
    sizes = _sizes(x, dt, b, c, cu_seqlens)
    chunks = chunk_inputs.most_chunks(sizes.B, sizes.T, cu_seqlens)
    pieces = 1 if fixed_split else _pieces(sizes, chunks, 1, 1, _multiprocessors(x.get_device()))
    return (0,) if pieces == 1 else _ends_shape(sizes, pieces)


def has_room_back(x: Tensor, b: Tensor) -> bool:
    """Whether `backward` takes heads of these widths."""
    return max(x.shape[3], b.shape[3]) <= _MOST_BACK


def _width(K: int) -> int:
    return next(width for width in _WIDTHS if width >= K)


@functools.cache
def _windows(sizes: _Sizes, chunks: int) -> int:
    """Parts of the heads that the backward takes one after the other, for room: two tensors of states are there."""
    of_states, of_o = 4 * chunks * sizes.H * sizes.V * sizes.K, 2 * sizes.B * sizes.T * sizes.H * sizes.V
    most = cubin.native().ssd_most_windows(sizes)
    return max(1, min(most, -(-of_states // max(_MOST_STATES, 2 * of_o))))


@functools.cache
def _pieces(sizes: _Sizes, chunks: int, directions: int, windows: int, multiprocessors: int) -> int:
    """That a sequence is cut into: as many as end soonest where blocks run in full waves.

    A cut sequence is walked twice, first for what each piece begins with.
    """
    sequences = max(1, sizes.N)
    blocks, each = directions * -(-sizes.blocks // windows), chunks // sequences

    def chunks_run(pieces: int) -> float:
        waves = windows * -(-blocks * pieces // multiprocessors)
        return waves * (-(-each // pieces) + _START) * (_CUT_COST if pieces > 1 else 1.0)

    most = max(1, min(_MAX_PIECES, each // _LEAST_PIECE, cuda_inputs.MAX_GRID // sequences))
    return min(range(1, most + 1), key=chunks_run)


@functools.cache
def _merged(sizes: _Sizes, chunks: int, windows: int, pieces: int, multiprocessors: int) -> int:
    """Pieces that a block of the backward walks one after the other, by the same measure."""
    blocks, each = 2 * -(-sizes.blocks // windows), -(-chunks // (max(1, sizes.N) * pieces))

    def chunks_run(merged: int) -> int:
        return -(-blocks * (pieces // merged) // multiprocessors) * (each * merged + _START)

    return min((merged for merged in range(1, pieces + 1) if pieces % merged == 0), key=chunks_run)


def _ends_shape(sizes: _Sizes, pieces: int) -> tuple[int, ...]:
    return sizes.N, pieces, sizes.H, sizes.V, sizes.K


def _sizes(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor | None) -> _Sizes:
    (B, T, HX, V), (GB, K) = x.shape, b.shape[2:]
    return _Sizes(B, T, HX, GB, c.shape[2], dt.shape[2], V, K, chunk_inputs.sequences(B, cu_seqlens))


def spec(dtype: str, width: int, values: int | None, unit: str) -> cubin.Spec:
    """One of the kernels' files for a type and widths by the build's names; only the gradients' has a V."""
    of_values = () if values is None else (("V", values),)
    return cubin.Spec("ssd", (("T", dtype), *of_values, ("K", width)), unit)


@functools.cache
def _why_no_code(dtype: torch.dtype, width: int) -> str | None:
    """The reason why nothing can be launched here. One cubin stands for all of a width: they are packaged together."""
    return cubin.why_not_native() or cubin.why_not(spec(_TYPES[dtype], width, None, "kernel"))


@functools.cache
def _compile(dtype: torch.dtype, width: int, values: int | None, source: str | None) -> None:
    """Compiles at once what is not packaged: the forward, or the backward for so many V."""
    units = [("kernel", None)] if values is None else [("kernel", None), ("backward", None), ("gradients", values)]
    cubin.compile_missing([spec(_TYPES[dtype], width, of_values, unit) for unit, of_values in units], source)


@functools.cache
def _shared_bytes(name: str, sizes: _Sizes) -> int:
    native = cubin.native()
    if name == "gradients":
        return int(native.ssd_gradients_shared_bytes(sizes.most_values, sizes.width, sizes))
    return int(native.ssd_chunk_shared_bytes(name, sizes.width, sizes))


@functools.cache
def _kernel(
    device: int, dtype: torch.dtype, width: int, values: int | None, name: str, shared: int, source: str | None
) -> "Kernel":
    _compile(dtype, width, values, source)
    unit = _UNITS[name]
    symbol = f"ssd_{'fwd' if unit == 'kernel' else 'bwd'}_kernel_{name}"
    return cubin.load(spec(_TYPES[dtype], width, values, unit), symbol, device, shared_bytes=shared, source=source)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
