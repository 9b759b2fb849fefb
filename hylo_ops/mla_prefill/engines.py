"""What attends to one slice's keys and values: operators of PyTorch that also give the log-sum-exp.

An engine takes q [1, H, T, K], k [1, HK, S, K], v [1, HK, S, V] (a head h reads h // (H / HK)) and gives o [T, H, V]
and lse [T, H], natural log. With `causal` T is S, and query t sees the first t + 1 keys.
"""

import torch
from torch import Tensor

from hylo_ops.common.sequences import working_dtype

_SCORES = 2**26  # numbers the eager engine has of scores at once: 256 MiB


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The fastest engine that takes the slice."""
    if q.is_cuda:
        return (cudnn if takes_cudnn(q, k, v, causal) else eager)(q, k, v, scale, causal)
    return (cpu if q.device.type == "cpu" and k.shape[3] == v.shape[3] else eager)(q, k, v, scale, causal)


def takes_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> bool:
    """PyTorch's own answer: 16 bits, widths that are multiples of 8 up to a limit, two keys or more, from sm_80 on."""
    grouped = q.shape[1] != k.shape[1]
    return torch.backends.cuda.can_use_cudnn_attention(
        torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, grouped)
    )


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention; below the public function, which does not give the log-sum-exp."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return _by_token(found[0], found[1])


def cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention for the CPU; of one width for keys and values."""
    return _by_token(*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale))


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Products and a softmax in fp32 (fp64), as many queries at a time as `_SCORES` allows."""
    compute, (heads, tokens) = working_dtype(q), q.shape[1:3]
    q, k, v = q[0].to(compute), k[0].to(compute), v[0].to(compute)
    stride = max(_SCORES // (heads * k.shape[1]), 1)
    parts = [
        _eager_block(q[:, first : first + stride], k, v, scale, first if causal else None)
        for first in range(0, tokens, stride)
    ]
    o, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return _by_token(o, lse)


def _eager_block(q: Tensor, k: Tensor, v: Tensor, scale: float, first: int | None) -> tuple[Tensor, Tensor]:
    """q [H, T, K], whose first query is number `first` of a causal call -> o [H, T, V], lse [H, T]."""
    heads, tokens = q.shape[:2]
    grouped = q.reshape(len(k), -1, q.shape[2])  # heads that share keys stand side by side: [HK, H / HK * T, K]
    scores = (scale * grouped @ k.mT).view(heads, tokens, -1)
    if first is not None:
        unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill_(unseen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    return (weights.view(len(k), -1, k.shape[1]) @ v).view(heads, tokens, -1), lse


def _by_token(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[1, H, T, V], [1, H, T] or cuDNN's [1, H, T, 1] -> views [T, H, V], [T, H]."""
    o = o.reshape(o.shape[-3:])
    return o.transpose(0, 1), lse.reshape(o.shape[:2]).mT
