"""Public function of causal attention over expanded keys and values.

A choice among PyTorch's attentions, not a kernel: autograd, autocast and what a compiler sees are PyTorch's own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hylo_ops import checks
from hylo_ops.mla_attention import reference

# PyTorch's fused attentions on CUDA.
FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def mla_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, backend: str | None = None) -> Tensor:
    """Causal attention of a sequence to itself, with keys and values shared by groups of heads:

        o[t, h] = sum_{s <= t} p_s v[s, g];   p = softmax_{s <= t}(scale q[t, h] . k[s, g]);   g = h // (H / HK)

    For training and for a prefill with nothing before it; over a longer latent cache there is `mla_prefill`.

    Dims: B batch, T tokens, H heads, HK heads of keys and values (divides H), K width of queries and keys, V width of
        values.
    Args:
        q: [B, T, H, K] bf16 | fp16 | fp32 | fp64. Where autocast is on, q, k and v are cast to its dtype first.
        k: [B, T, HK, K], dtype of q. The part without positions and the rotated rope key that all heads share, joined.
        v: [B, T, HK, V], dtype of q.
        scale: K ** -0.5.
        backend: None takes, on CUDA, the first in PyTorch's order of its "cudnn", "flash" and "efficient" that supports
            the inputs (on Hopper cudnn comes first), and never its composed attention, whose scores take T x T
            memory; in fp64 "reference"; on other devices what PyTorch takes. A named one never falls back.
    Returns:
        o: [B, T, H, V], dtype of q.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
        NotImplementedError: the named backend, or on CUDA each one, cannot run these inputs; the message says which.
    Numerics: fp32 accumulation (fp64 for fp64), weights rounded to the dtype of q before they meet v, but for
        "reference"; differentiable in q, k and v; deterministic: where PyTorch's attention is.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """
    q, k, v = (_in_autocast(t) for t in (q, k, v))
    _check(q, k, v)
    if backend is not None and backend not in FUSED and backend != "reference":
        raise NotImplementedError(f"mla_attention has no backend {backend!r}; it has {[*FUSED, 'reference']}")
    if backend in FUSED and not q.is_cuda:
        raise NotImplementedError(f"mla_attention cannot run on {backend}: q is on {q.device}, not on a CUDA device")
    alone = q.is_cuda and (q.dtype == torch.float64 or q.numel() == 0)  # no fused attention takes these
    if backend == "reference" or (backend is None and alone):
        return reference.mla_attention(q, k, v, scale)
    if q.is_cuda:
        return _fused(q, k, v, scale, [backend] if backend else list(FUSED))
    return _attend(q, k, v, scale)


def _in_autocast(t: Tensor) -> Tensor:
    """In autocast's dtype where that is on, as PyTorch does to what its attention gets."""
    device = t.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast, and asking breaks a graph
    return t.to(torch.get_autocast_dtype(device)) if on and t.dtype != torch.float64 else t


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    checks.shape("q", q, "B", "T", "H", "K")
    checks.dtype("q", q, checks.FLOATS)
    batch, tokens, heads, width = q.shape
    checks.shape("k", k, batch, tokens, "HK", width)
    checks.shape("v", v, batch, tokens, k.shape[2], "V")
    checks.multiple("the heads of q", heads, "the heads of k", k.shape[2])
    for name, tensor in (("k", k), ("v", v)):
        checks.dtype(name, tensor, (q.dtype,))
    checks.same_device("q", q, k=k, v=v)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, names: list[str]) -> Tensor:
    """One of these attentions, in PyTorch's order, and no other.

    The order stays PyTorch's: it has cuDNN first where cuDNN is the fastest and sound. It is global and made at the
    first call; who sets another one around that call takes PyTorch's away for good.
    """
    if names == ["efficient"] or _only_efficient(q, v):
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    try:
        with sdpa_kernel([FUSED[name] for name in names]):
            return _attend(q, k, v, scale)
    except RuntimeError as problem:
        if "No available kernel" not in str(problem) and "No viable backend" not in str(problem):
            raise
        inputs = f"{q.shape[1]} tokens, keys of {q.shape[3]} and values of {v.shape[3]} in {q.dtype} on {q.device}"
        raise NotImplementedError(f"mla_attention cannot run {inputs} on {', '.join(names)}") from problem


def _only_efficient(q: Tensor, v: Tensor) -> bool:
    """Whether nothing but the efficient attention can run them, which reads no grouped heads.

    The others take no fp32; cuDNN takes no single key, and flash no two widths.
    """
    return q.dtype == torch.float32 or (q.shape[1] == 1 and q.shape[3] != v.shape[3])


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).contiguous()
