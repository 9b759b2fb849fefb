"""`chunk_ssd` of x, b and c that lie side by side in one tensor, as a Mamba2 block's convolution leaves them.

Its gradient is one tensor too. Of three views autograd would put it together from three tensors: a copy of all of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hylo_ops.backend import Backend
from hylo_ops.library import define_op
from hylo_ops.ssd import cuda
from hylo_ops.ssd.op import CHUNK_BACKENDS, check_chunk, fake_chunk

Dims = tuple[int, int, int, int]  # V, K, heads of x, heads of b


def chunk_joined_ssd(
    xbc: Tensor,
    dt: Tensor,
    a: Tensor,
    dims: Dims,
    *,
    d: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float] | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """`chunk_ssd` of the parts of xbc, [B, T, D]: heads of V for x, of K for b, then of K for c."""
    x, b, c = split(xbc, dims)
    check_chunk(x, dt, a, b, c, d, dt_bias, dt_limit, initial_state, cu_seqlens)
    return _forward(xbc, dt, a, d, dt_bias, initial_state, cu_seqlens, *dims, dt_softplus, dt_limit, backend)


def split(xbc: Tensor, dims: Dims) -> tuple[Tensor, Tensor, Tensor]:
    """x, b and c, [B, T, heads, width] each, as views."""
    V, K, x_heads, b_heads = dims
    sizes = (x_heads * V, b_heads * K)
    x, b, c = xbc.split([*sizes, xbc.shape[-1] - sum(sizes)], dim=-1)
    return x.unflatten(-1, (x_heads, V)), b.unflatten(-1, (b_heads, K)), c.unflatten(-1, (-1, K))


def _parted(
    xbc: Tensor,
    dt: Tensor,
    a: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    V: int,
    K: int,
    x_heads: int,
    b_heads: int,
    dt_softplus: bool,
    dt_limit: Sequence[float] | None,
) -> dict[str, Any]:
    """The arguments of `chunk_ssd`, in its order."""
    x, b, c = split(xbc, (V, K, x_heads, b_heads))
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "fixed_split": False}
    vectors = {"d": d, "dt_bias": dt_bias, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    return {"x": x, "dt": dt, "a": a, "b": b, "c": c, **vectors, **options}


def _joined(backend: Backend) -> Backend:
    """One of `chunk_ssd`'s for this op."""

    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return backend.forward(*_parted(*inputs).values())

    def backward(grads: list[Tensor], *inputs: Any) -> list[Tensor]:
        parted = _parted(*inputs)
        d_xbc = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        room = split(d_xbc, inputs[7:11])
        if backend.name == "cuda":
            found = cuda.chunk_backward(grads, *parted.values(), room=room)
        else:
            assert backend.backward is not None
            found = backend.backward(grads, *parted.values())
        dx, ddt, da, db, dc, *others = found
        for part, gradient in zip(room, (dx, db, dc), strict=True):
            if part.data_ptr() != gradient.data_ptr():
                part.copy_(gradient)
        return [d_xbc, ddt, da, *others]

    def adapted(why_not: Any) -> Any:
        return None if why_not is None else lambda **inputs: why_not(**_parted(**inputs))

    return dataclasses.replace(
        backend,
        why_not=adapted(backend.why_not),
        forward=forward,
        backward=backward,
        backward_why_not=adapted(backend.backward_why_not),
    )


def _fake(xbc: Tensor, dt: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return fake_chunk(*_parted(xbc, dt, *others).values())


_forward = define_op(
    "chunk_joined_ssd",
    "(Tensor xbc, Tensor dt, Tensor a, Tensor? d, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, int V, "
    "int K, int x_heads, int b_heads, bool dt_softplus, float[]? dt_limit, str? backend) -> (Tensor, Tensor)",
    backends=[_joined(backend) for backend in CHUNK_BACKENDS],
    fake=_fake,
    differentiable=("xbc", "dt", "a", "d", "dt_bias", "initial_state"),
)
