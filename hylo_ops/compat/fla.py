"""The gated delta rule in the argument form of flash-linear-attention 0.6, which transformers' Qwen3-Next calls too.

from hylo_ops.compat import fla
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

qwen3_next.torch_chunk_gated_delta_rule = fla.chunk_gated_delta_rule
qwen3_next.torch_recurrent_gated_delta_rule = fla.fused_recurrent_gated_delta_rule
"""

import torch
from torch import Tensor

from hylo_ops import chunk_gated_delta_rule as chunk
from hylo_ops import recurrent_gated_delta_rule as recurrent
from hylo_ops.compat.keywords import refuse_unknown

__all__ = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]

_L2_NORM_EPS = 1e-6


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **of_the_model: object,
) -> tuple[Tensor, Tensor | None]:
    """`hylo_ops.chunk_gated_delta_rule`, whose docstring has the shapes of q, k, v, g, beta and `initial_state`.

    Args:
        scale: K ** -0.5 if None.
        initial_state: [N, H, K, V]; computed with in fp32.
        output_final_state: give the final state, else None in its place.
        use_qk_l2norm_in_kernel: q and k are divided by sqrt(sum of squares + 1e-6) first, in fp32.
        cu_seqlens: [N + 1] int32 | int64.
        of_the_model: what transformers passes along for others, such as `use_cache`: ignored.
    Returns:
        o: [B, T, H, V], dtype of v.   final_state: [N, H, K, V] fp32, or None.
    Raises:
        TypeError: an argument has a name that neither the form nor transformers' models have.
        ValueError, NotImplementedError: as the op.
    """
    refuse_unknown("chunk_gated_delta_rule", of_the_model)
    if use_qk_l2norm_in_kernel:
        q, k = _l2_normalised(q), _l2_normalised(k)
    initial_state = None if initial_state is None else _wide(initial_state)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.int()
    o, final_state = chunk(q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return o, final_state if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **of_the_model: object,
) -> tuple[Tensor, Tensor | None]:
    """One or several more tokens of each sequence; arguments and results as `chunk_gated_delta_rule` above.

    `initial_state` stays as it is: a new state is returned. One token goes through
    `hylo_ops.recurrent_gated_delta_rule`. Several tokens, packed sequences, and inputs that want a gradient go through
    `hylo_ops.chunk_gated_delta_rule`, which computes the same.

    Args:
        g: None: no decay.
        beta: None: ones.
    """
    refuse_unknown("fused_recurrent_gated_delta_rule", of_the_model)
    g = v.new_zeros(v.shape[:3], dtype=torch.float32) if g is None else g
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    differentiated = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, g, beta, initial_state)
    )
    if q.shape[1] != 1 or cu_seqlens is not None or differentiated:
        return chunk_gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
        )
    if use_qk_l2norm_in_kernel:
        q, k = _l2_normalised(q), _l2_normalised(k)
    state = _new_state(q, v) if initial_state is None else _wide(initial_state.clone())
    o = recurrent(q, k, v, g, beta, state, scale=scale)
    return o, state if output_final_state else None


def _l2_normalised(x: Tensor) -> Tensor:
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _L2_NORM_EPS)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """fp32 of what is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _new_state(q: Tensor, v: Tensor) -> Tensor:
    dtype = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
    return q.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=dtype)
