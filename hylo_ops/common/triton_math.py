"""What the Triton kernels of several stems share: types of products, how they begin, softplus, decays, and chunks."""

import torch
import triton
import triton.language as tl

INTERPRETING = triton.knobs.runtime.interpret

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# Products of float32 on tensor cores: three tf32 products with the operands split in two parts. Full float32 products
# ("ieee") run on the scalar units out of registers, and tiles of 64 tokens spill 10 to 50 KB a thread.
PRECISION = tl.constexpr("tf32x3")

_LOG2_E = tl.constexpr(1.4426950408889634)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type a kernel casts the operands of its products to, right after the load.

    The interpreter adds and multiplies the bits of bf16 as if they were integers, so it gets float32.
    """
    return tl.float32 if INTERPRETING else _TYPES[dtype]


@triton.jit
def begin_early(EARLY: tl.constexpr):
    """Where `launch` was asked for it: lets the next kernel begin as well, and waits until the one ahead has ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def softplus(x):
    small = tl.exp(-tl.abs(x))
    u = 1.0 + small
    # log(1 + small): the quotient takes back what rounding u lost
    log1p = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def chunk_at(i_slot, p_sequence, p_begin, p_end, T, C: tl.constexpr):
    """Sequence of a slot of the chunk table (-1: unused), the chunk's first token, the end of the sequence."""
    if p_sequence is None:
        chunks = tl.cdiv(T, C)
        i_sequence = i_slot // chunks
        first = i_sequence.to(tl.int64) * T
        begin = first + i_slot % chunks * C
        end = first + T
    else:
        i_sequence = tl.load(p_sequence + i_slot)
        begin = tl.load(p_begin + i_slot)
        end = tl.load(p_end + i_slot)
    return i_sequence, begin, end


@triton.jit
def sequence_at(i_sequence, p_bounds, p_first_chunk, T, C: tl.constexpr):
    """First token and end of a sequence, and the slot of its first chunk."""
    if p_bounds is None:
        begin = i_sequence.to(tl.int64) * T
        end = begin + T
        slot = i_sequence * tl.cdiv(T, C)
    else:
        begin = tl.load(p_bounds + i_sequence)
        end = tl.load(p_bounds + i_sequence + 1)
        slot = tl.load(p_first_chunk + i_sequence)
    return begin, end, slot


@triton.jit
def decay(b_exponent):
    """exp of a float64 exponent in float32: scaled to base 2 before the cast, one rounding instead of two."""
    return tl.exp2((b_exponent * _LOG2_E).to(tl.float32))


@triton.jit
def decay_between(b_gamma, m_pairs):
    """exp(gamma_i - gamma_j) where the mask holds, else 0. Masked before exp, which above the diagonal overflows.

    Rows past the end need a mask as well, if their gamma is not the last valid one.
    """
    b_gamma = b_gamma * _LOG2_E
    b_exponent = tl.where(m_pairs, b_gamma[:, None] - b_gamma[None, :], float("-inf"))
    return tl.exp2(b_exponent.to(tl.float32))
