"""A chunk's losses, and then their gradient with respect to the student's logits, in Triton: docs/linear_kl.md."""

import triton
import triton.language as tl
from torch import Tensor

from hylo_ops.common.triton_launch import ceil_div, launch
from hylo_ops.linear_kl.chunked import Terms

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST = tl.constexpr(-1.0e38)  # a maximum of nothing: finite, for its difference from another to be a number
_BV_LOSS, _BV_GRADIENT = 2048, 4096
_WARPS = 8
# What the first kernel leaves: maxima of student and teacher, log-sums of q and p, KL, log-sum of the student.
_SUMS = tl.constexpr(8)


@triton.jit
def _with_maximum(b_sum, b_max, b_new, to_base_2):
    """Sums of exp2 relative to another maximum."""
    return b_sum * tl.exp2((b_max - b_new) * to_base_2)


@triton.jit
def _weighted(b_ratio, b_weights, b_first_max, b_first_new, b_second_max, b_second_new, to_base_2):
    """Sums of weights times (first logit - second logit), logits and weights relative to other maxima."""
    b_shift = (b_first_max - b_first_new) - (b_second_max - b_second_new)
    return _with_maximum(b_ratio + b_weights * b_shift, b_first_max, b_first_new, to_base_2)


@triton.jit
def _log_sum(b_sum, b_max, maximum, to_base_2):
    """Natural log of the lanes' sums of exp2, relative to the maximum of all."""
    return tl.log2(tl.sum(_with_maximum(b_sum, b_max, maximum, to_base_2), axis=0)) * _LN_2


@triton.jit
def linear_kl_fwd_kernel_loss(
    p_student,
    p_teacher,
    p_targets,
    p_kl_shares,
    p_ce_shares,
    p_sums,
    p_losses,
    V,
    inverse_temperature,
    REVERSE: tl.constexpr,
    BV: tl.constexpr,
):
    """A token's loss, and what its gradient needs: maxima, log-sums relative to them, and KL.

    Each lane has sums of its own, so that no step of the loop waits for other lanes. All logits are relative to a
    maximum: where both models agree, that is what their differences are small against.
    """
    i_token = tl.program_id(0).to(tl.int64)
    p_student += i_token * V
    kl_base_2 = inverse_temperature * _LOG2_E
    b_s_max = tl.full([BV], _LEAST, tl.float32)
    b_s_sum = tl.zeros([BV], tl.float32)  # at temperature 1
    b_q_sum = tl.zeros([BV], tl.float32)  # at the temperature
    b_t_max = tl.full([BV], _LEAST, tl.float32)
    b_p_sum = tl.zeros([BV], tl.float32)
    b_ratio = tl.zeros([BV], tl.float32)  # of the first distribution times the difference of logits
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        m_v = o_v < V
        b_s = tl.load(p_student + o_v, mask=m_v, other=float("-inf"))
        b_s_new = tl.maximum(b_s_max, b_s)
        b_s -= b_s_new
        if p_ce_shares is not None:
            b_s_sum = _with_maximum(b_s_sum, b_s_max, b_s_new, _LOG2_E) + tl.exp2(b_s * _LOG2_E)
        if p_teacher is not None:
            b_t = tl.load(p_teacher + i_token * V + o_v, mask=m_v, other=float("-inf"))
            b_t_new = tl.maximum(b_t_max, b_t)
            b_t -= b_t_new
            b_difference = tl.where(m_v, b_t - b_s, 0.0)
            b_q, b_p = tl.exp2(b_s * kl_base_2), tl.exp2(b_t * kl_base_2)
            if REVERSE:
                b_ratio = _weighted(b_ratio, b_q_sum, b_s_max, b_s_new, b_t_max, b_t_new, kl_base_2)
                b_ratio -= b_q * b_difference
            else:
                b_ratio = _weighted(b_ratio, b_p_sum, b_t_max, b_t_new, b_s_max, b_s_new, kl_base_2)
                b_ratio += b_p * b_difference
            b_q_sum = _with_maximum(b_q_sum, b_s_max, b_s_new, kl_base_2) + b_q
            b_p_sum = _with_maximum(b_p_sum, b_t_max, b_t_new, kl_base_2) + b_p
            b_t_max = b_t_new
        b_s_max = b_s_new
    loss = 0.0
    p_sums += i_token * _SUMS
    s_max = tl.max(b_s_max, axis=0)
    tl.store(p_sums, s_max)
    if p_teacher is not None:
        t_max = tl.max(b_t_max, axis=0)
        log_q_sum = _log_sum(b_q_sum, b_s_max, s_max, kl_base_2)
        log_p_sum = _log_sum(b_p_sum, b_t_max, t_max, kl_base_2)
        if REVERSE:
            ratio = tl.sum(_weighted(b_ratio, b_q_sum, b_s_max, s_max, b_t_max, t_max, kl_base_2), axis=0)
            kl = ratio * inverse_temperature * tl.exp(-log_q_sum) + (log_p_sum - log_q_sum)
        else:
            ratio = tl.sum(_weighted(b_ratio, b_p_sum, b_t_max, t_max, b_s_max, s_max, kl_base_2), axis=0)
            kl = ratio * inverse_temperature * tl.exp(-log_p_sum) + (log_q_sum - log_p_sum)
        loss += tl.load(p_kl_shares + i_token) * kl
        tl.store(p_sums + 1, t_max)
        tl.store(p_sums + 2, log_q_sum)
        tl.store(p_sums + 3, log_p_sum)
        tl.store(p_sums + 4, kl)
    if p_ce_shares is not None:
        log_s_sum = _log_sum(b_s_sum, b_s_max, s_max, _LOG2_E)
        share = tl.load(p_ce_shares + i_token)
        target = tl.load(p_targets + i_token)
        inside = (target >= 0) & (target < V)
        picked = tl.load(p_student + target, mask=inside, other=0.0)
        # Of a class that there is not: NaN, if it counts.
        picked = tl.where(inside, picked, tl.where(share != 0.0, float("nan"), 0.0))
        loss += share * (log_s_sum - (picked - s_max))
        tl.store(p_sums + 5, log_s_sum)
    tl.store(p_losses + i_token, loss)


@triton.jit
def linear_kl_fwd_kernel_gradient(
    p_student,
    p_teacher,
    p_targets,
    p_kl_shares,
    p_ce_shares,
    p_sums,
    p_gradient,
    V,
    inverse_temperature,
    REVERSE: tl.constexpr,
    BV: tl.constexpr,
):
    """A tile of a token's gradient; it may lie where the student's logits do."""
    i_token = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_v = o_v < V
    p_sums += i_token * _SUMS
    b_s = tl.load(p_student + i_token * V + o_v, mask=m_v, other=0.0) - tl.load(p_sums)
    b_slope = tl.zeros([BV], tl.float32)
    if p_teacher is not None:
        b_t = tl.load(p_teacher + i_token * V + o_v, mask=m_v, other=0.0) - tl.load(p_sums + 1)
        b_log_q = b_s * inverse_temperature - tl.load(p_sums + 2)
        b_log_p = b_t * inverse_temperature - tl.load(p_sums + 3)
        if REVERSE:
            b_slope += tl.exp(b_log_q) * (b_log_q - b_log_p - tl.load(p_sums + 4))
        else:
            b_slope += tl.exp(b_log_q) - tl.exp(b_log_p)
        b_slope *= tl.load(p_kl_shares + i_token) * inverse_temperature
    if p_ce_shares is not None:
        b_p = tl.exp(b_s - tl.load(p_sums + 5))
        b_hit = tl.where(o_v == tl.load(p_targets + i_token), 1.0, 0.0)
        b_slope += tl.load(p_ce_shares + i_token) * (b_p - b_hit)
    tl.store(p_gradient + i_token * V + o_v, b_slope.to(p_gradient.dtype.element_ty), mask=m_v)


def rows(student: Tensor, teacher: Tensor | None, terms: Terms, gradient: Tensor | None) -> Tensor:
    """`chunked.Rows` of contiguous fp32 logits."""
    count, vocabulary = student.shape
    losses, sums = student.new_empty(count), student.new_empty(count, _SUMS.value)
    numbers = (vocabulary, 1 / terms.temperature)
    given = (student, teacher, terms.targets, terms.kl_shares, terms.ce_shares, sums)
    constants = (terms.reverse, _BV_LOSS)
    launch(linear_kl_fwd_kernel_loss, (count, 1, 1), (*given, losses), numbers, constants, _WARPS)
    if gradient is not None:
        grid, constants = (count, ceil_div(vocabulary, _BV_GRADIENT), 1), (terms.reverse, _BV_GRADIENT)
        launch(linear_kl_fwd_kernel_gradient, grid, (*given, gradient), numbers, constants, _WARPS)
    return losses
