"""Expanded attention in other libraries: the block that a prefill over a long cache is made of.

The layout that a library wants, plans and bounds are made outside the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.forms import widened
from bench.peers import imported
from bench.timing import Call

_FLASHINFER_WORKSPACE = 512 << 20  # bytes


@dataclass(frozen=True)
class Block:
    """T queries over T keys that stand before them, so that nothing is masked; a head h reads h // (H / HK).

    Args:
        q: [1, T, H, K]. k: [1, T, HK, K]. v: [1, T, HK, V].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def bounds(self) -> Tensor:
        """[2] int32: where the sequence begins, and its end."""
        return torch.tensor([0, self.q.shape[1]], dtype=torch.int32, device=self.q.device)


BlockForm = Callable[[Block], Callable[[], Tensor]]  # the timed call gives o [T, H, V] or a view of it
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # on [1, H, T, width] each


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """With the log-sum-exp, which merging needs."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, scale=scale)[0]


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[0]


ENGINES: dict[str, Attend] = {"cudnn": _cudnn, "flash": _flash}


def _torch(engine: str, grouped: bool, block: Block) -> Callable[[], Tensor]:
    heads = block.k.shape[2] if grouped else block.q.shape[2]
    k, v = (widened(t, heads) for t in (block.k, block.v))
    q, k, v = (t.transpose(1, 2).contiguous() for t in (block.q, k, v))
    attend = ENGINES[engine]
    return lambda: attend(q, k, v, block.scale)[0].transpose(0, 1)


def _fa3(block: Block) -> Call:
    attention = imported("vllm.vllm_flash_attn", "flash_attn_varlen_func")
    tokens = block.q.shape[1]
    return partial(
        attention,
        *(block.q[0], block.k[0], block.v[0]),
        max_seqlen_q=tokens,
        cu_seqlens_q=block.bounds,
        max_seqlen_k=tokens,
        cu_seqlens_k=block.bounds,
        softmax_scale=block.scale,
        causal=False,
        fa_version=3,
    )


def _flashinfer(block: Block) -> Call:
    wrapper_type = imported("flashinfer.prefill", "BatchPrefillWithRaggedKVCacheWrapper")
    workspace = torch.empty(_FLASHINFER_WORKSPACE, dtype=torch.uint8, device=block.q.device)
    wrapper = wrapper_type(workspace, "NHD", backend="fa3")
    wrapper.plan(
        qo_indptr=block.bounds,
        kv_indptr=block.bounds,
        num_qo_heads=block.q.shape[2],
        num_kv_heads=block.k.shape[2],
        head_dim_qk=block.q.shape[3],
        head_dim_vo=block.v.shape[3],
        causal=False,
        sm_scale=block.scale,
        q_data_type=block.q.dtype,
        kv_data_type=block.k.dtype,
    )
    return partial(wrapper.run, block.q[0], block.k[0], block.v[0])


FORMS: dict[str, BlockForm] = {
    "torch_cudnn": partial(_torch, "cudnn", False),
    "torch_cudnn_grouped": partial(_torch, "cudnn", True),
    "torch_flash": partial(_torch, "flash", False),
    "fa3": _fa3,
    "flashinfer_fa3": _flashinfer,
}
