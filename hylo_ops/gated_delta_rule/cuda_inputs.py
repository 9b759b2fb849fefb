"""What the chunked kernels of the CUDA backend, for 16 bits and for fp32, have in common: the inputs they take."""

from torch import Tensor

from hylo_ops.common import chunk_inputs

WIDTHS = (64, 128, 256)  # of keys that kernels are compiled for; a head of another width runs in the next wider one's
assert WIDTHS[-1] == chunk_inputs.MAX_WIDTH


def why_not(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> str | None:
    """The reason why no chunked kernel can take the inputs, or None. Shapes are taken to be the op's."""
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of one dtype"
    return chunk_inputs.why_not({"q": q, "k": k, "v": v}, q.shape[3], v.shape[3], initial_state)


def width(K: int) -> int:
    """Of the kernels that take heads of K."""
    return next(width for width in WIDTHS if width >= K)
