"""`causal_conv1d` and `chunk_ssd` of its output as one op, for a Mamba2 block: x, b and c lie side by side in a tensor.

So the gradient of that tensor is one, too: of three views autograd would put it together from three, a copy of all of
it. And on CUDA one kernel can convolve x and make the states that the scan begins with.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hylo_ops.backend import Backend, choose
from hylo_ops.causal_conv1d.op import BACKENDS as CONV_BACKENDS
from hylo_ops.causal_conv1d.op import fake_forward as fake_convolution
from hylo_ops.library import able_backward, define_op
from hylo_ops.ssd import cuda, cuda_chunk, cuda_inputs
from hylo_ops.ssd.op import CHUNK_BACKENDS, check_chunk, fake_chunk, saves_states

_CONV_BACKWARD, _CHUNK_BACKWARD = able_backward(CONV_BACKENDS), able_backward(CHUNK_BACKENDS)
_CONVOLUTION = ("xbc", "weight", "bias", "conv_state")
_SCAN = ("dt", "a", "d", "dt_bias", "initial_state")
_DIFFERENTIABLE = ("xbc", "weight", "bias", "dt", "a", "d", "dt_bias", "conv_state", "initial_state")

Dims = tuple[int, int, int, int]  # V, K, heads of x, heads of b


def convolved_ssd(
    xbc: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dt: Tensor,
    a: Tensor,
    dims: Dims,
    *,
    d: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final_state and the last inputs of the convolution: `causal_conv1d` of xbc, [B, T, D], with silu, then
    `chunk_ssd` of its parts: heads of V for x, of K for b, then of K for c."""
    x, b, c = split(xbc, dims)
    check_chunk(x, dt, a, b, c, d, dt_bias, dt_limit, initial_state, cu_seqlens)
    given = _Inputs(
        *(xbc, weight, bias, dt, a, d, dt_bias, conv_state, initial_state, cu_seqlens),
        *(*dims, dt_softplus, dt_limit, saves_states(backend)),
    )
    o, final_state, last_inputs, _, _ = _forward(*given, backend)
    return o, final_state, last_inputs


def split(xbc: Tensor, dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """x, b and c, [B, T, heads, width] each, as views."""
    V, K, x_heads, b_heads = dims
    sizes = (x_heads * V, b_heads * K)
    x, b, c = xbc.split([*sizes, xbc.shape[-1] - sum(sizes)], dim=-1)
    return x.unflatten(-1, (x_heads, V)), b.unflatten(-1, (b_heads, K)), c.unflatten(-1, (-1, K))


class _Inputs(NamedTuple):
    """The op's, in its order."""

    xbc: Tensor
    weight: Tensor
    bias: Tensor | None
    dt: Tensor
    a: Tensor
    d: Tensor | None
    dt_bias: Tensor | None
    conv_state: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    V: int
    K: int
    x_heads: int
    b_heads: int
    dt_softplus: bool
    dt_limit: Sequence[float] | None
    save_states: bool

    @property
    def dims(self) -> Dims:
        return self.V, self.K, self.x_heads, self.b_heads

    def of_convolution(self) -> dict[str, Any]:
        """The arguments of `causal_conv1d`, in its order."""
        names = ("x", "weight", "bias", "initial_state", "cu_seqlens", "activation")
        return dict(zip(names, (*self[:3], self.conv_state, self.cu_seqlens, "silu"), strict=True))

    def of_scan(self, mixed: Tensor) -> dict[str, Any]:
        """The same of `chunk_ssd`, of what the convolution made."""
        x, b, c = split(mixed, self.dims)
        vectors = {name: getattr(self, name) for name in ("d", "dt_bias", "initial_state", "cu_seqlens")}
        options = {"dt_softplus": self.dt_softplus, "dt_limit": self.dt_limit, "fixed_split": False}
        options["save_states"] = self.save_states
        return {"x": x, "dt": self.dt, "a": self.a, "b": b, "c": c, **vectors, **options}

    def by_name(self, names: Sequence[str], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients of those of the inputs that are given."""
        return dict(zip((name for name in names if getattr(self, name) is not None), gradients, strict=True))


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # o, final_state, last inputs; saved: mixed, states


def _composed(requested: str | None) -> Callable[..., _Results]:
    """One op after the other, each on the backend asked for, or on the first that can."""

    def forward(*inputs: Any) -> _Results:
        given = _Inputs(*inputs)
        of_convolution = given.of_convolution()
        convolve = choose("causal_conv1d", CONV_BACKENDS, requested, of_convolution)
        mixed, last_inputs = convolve.forward(*of_convolution.values())
        of_scan = given.of_scan(mixed)
        scan = choose("chunk_ssd", CHUNK_BACKENDS, requested, of_scan)
        o, final_state, states = scan.forward(*of_scan.values())
        return o, final_state, last_inputs, mixed, states

    return forward


def _composed_backward(requested: str | None) -> Callable[..., list[Tensor]]:
    def backward(grads: list[Tensor], saved: list[Tensor], *inputs: Any) -> list[Tensor]:
        given, (mixed, states) = _Inputs(*inputs), saved
        d_mixed, of_scan = _scan_backward(grads[:2], states, mixed, given, requested)
        of_convolution = given.of_convolution()
        convolve = choose("causal_conv1d_backward", _CONV_BACKWARD, requested, of_convolution)
        assert convolve.backward is not None
        found = given.by_name(_CONVOLUTION, convolve.backward([d_mixed, grads[2]], *of_convolution.values()))
        found |= given.by_name(_SCAN, of_scan)
        return [found[name] for name in _DIFFERENTIABLE if name in found]

    return backward


def _scan_backward(
    grads: list[Tensor], states: Tensor, mixed: Tensor, given: _Inputs, requested: str | None
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of what the convolution made, and those of `_SCAN`."""
    of_scan = given.of_scan(mixed)
    scan = choose("chunk_ssd_backward", _CHUNK_BACKWARD, requested, of_scan)
    d_mixed = torch.empty_like(mixed)
    room = split(d_mixed, given.dims)
    if scan.name == "cuda":
        found = cuda.chunk_backward(grads, [states], *of_scan.values(), room=room)
    else:
        assert scan.backward is not None
        found = scan.backward(grads, [states], *of_scan.values())
    dx, ddt, da, db, dc, *others = found
    for part, gradient in zip(room, (dx, db, dc), strict=True):
        if part.data_ptr() != gradient.data_ptr():
            part.copy_(gradient)
    return d_mixed, [ddt, da, *others]


def _cuda(*inputs: Any) -> _Results:
    """x is convolved in the kernel that makes the states which pieces of a sequence begin with, b and c ahead of it."""
    given = _Inputs(*inputs)
    mixed = torch.empty_like(given.xbc, memory_format=torch.contiguous_format)
    last_inputs = given.xbc.new_empty(mixed.shape[0], *given.weight.shape)
    mixing = cuda_chunk.Mixing(given.xbc, given.weight, given.bias, mixed, last_inputs)
    *others, save_states = given.of_scan(mixed).values()
    o, final_state, states = cuda_chunk.forward(*others, save_states=save_states, mixing=mixing)
    return o, final_state, last_inputs, mixed, states


def _cuda_why_not(**named: Any) -> str | None:
    given = _Inputs(**named)
    channels = given.xbc.shape[2]
    if 2 * given.x_heads * given.V < channels:  # first: a block made of grouped-query attention need not go further
        return f"x has less than half of the {channels} channels: to convolve b and c alone takes as long"
    if given.conv_state is not None:
        return "there are inputs before the first token"
    for name, tensor in (("weight", given.weight), ("bias", given.bias)):
        if tensor is not None and tensor.dtype not in cuda_inputs.NUMBERS:
            return f"{name} is {tensor.dtype}"
    of_scan = given.of_scan(given.xbc)
    if (reason := cuda_chunk.why_not(**of_scan)) is not None:
        return reason
    x, b, c = (of_scan[name] for name in ("x", "b", "c"))
    return cuda_chunk.mixing_why_not(x, given.dt, b, c, given.cu_seqlens, given.weight.shape[1])


def _anywhere(**_: Any) -> None:
    """The parts say what they cannot do."""


def _fake(*inputs: Any) -> _Results:
    given = _Inputs(*inputs)
    mixed, last_inputs = fake_convolution(*given.of_convolution().values())
    o, final_state, states = fake_chunk(*given.of_scan(mixed).values())
    return o, final_state, last_inputs, mixed, states


_forward = define_op(
    "convolved_ssd",
    "(Tensor xbc, Tensor weight, Tensor? bias, Tensor dt, Tensor a, Tensor? d, Tensor? dt_bias, Tensor? conv_state, "
    "Tensor? initial_state, Tensor? cu_seqlens, int V, int K, int x_heads, int b_heads, bool dt_softplus, "
    "float[]? dt_limit, bool save_states, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backends=[
        Backend("cuda", _cuda_why_not, _cuda, _composed_backward(None), _anywhere),
        Backend("composed", _anywhere, _composed(None), _composed_backward(None)),
        *(Backend(name, _anywhere, _composed(name), _composed_backward(name)) for name in ("triton", "reference")),
    ],
    fake=_fake,
    differentiable=_DIFFERENTIABLE,
    saved=2,
)
