"""Cached rows in Triton, a tile of tokens at a time: where they lie, in pages or not, and what they hold, in fp8 too.

The formats: docs/mla_absorb.md.
"""

import triton
import triton.language as tl


@triton.jit
def load_pages(p_pages, begin, start, end, PAGE: tl.constexpr, BN: tl.constexpr):
    """Pages of the tile at `begin`: one that holds it all, or each token's. Entries that none needs are not read."""
    if PAGE % BN == 0:
        pages = tl.load(p_pages + begin // PAGE, mask=begin < end, other=0)
    else:
        o_s = begin + tl.arange(0, BN)
        pages = tl.load(p_pages + o_s // PAGE, mask=(o_s >= start) & (o_s < end), other=0)
    return pages.to(tl.int64)


@triton.jit
def load_keys(p_row, m_s, first, width, BW: tl.constexpr):
    """[BN, BW]: columns first.. of the cached rows; zeros where masked, as a weight of 0 times a NaN is NaN."""
    o_w = first + tl.arange(0, BW)
    m_k = m_s[:, None] & (o_w < width)[None, :]
    return tl.load(p_row[:, None] + o_w[None, :], mask=m_k, other=0)


@triton.jit
def rows_at(p_tensor, page, o_s, strides, PAGE: tl.constexpr, ALIGN: tl.constexpr):
    """Where the rows of the positions o_s begin in a cache, or in its key scales."""
    slot = (o_s % PAGE).to(tl.int64) if PAGE > 0 else o_s.to(tl.int64)
    return p_tensor + page * (strides[0] * ALIGN) + slot * (strides[1] * ALIGN)


@triton.jit
def load_key_scales(p_row, m_s, stride, HK: tl.constexpr, BHK: tl.constexpr):
    """[BN, BHK]: of the heads of the scales, at the rows p_row."""
    o_k = tl.arange(0, BHK)
    return tl.load(p_row[:, None] + o_k[None, :] * stride, mask=m_s[:, None] & (o_k < HK)[None, :], other=0.0)


@triton.jit
def load_tile(
    p_cache,
    p_scales,
    page,
    o_s,
    start,
    end,
    cache_strides,
    scale_strides,
    HK: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTHS: tl.constexpr,
    BE: tl.constexpr,
    BHK: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_SCALES: tl.constexpr,
    LATENT_SCALES_AT: tl.constexpr,
    ROPE_AT: tl.constexpr,
    ROPE: tl.constexpr,
):
    """What rows in fp8 hold at the positions o_s: latents as bytes, their scales, rope, key scales."""
    m_s = (o_s >= start) & (o_s < end)
    p_row = rows_at(p_cache, page, o_s, cache_strides, PAGE, ALIGN)
    b_bits = ()
    b_c = ()
    at = 0
    for i in tl.static_range(len(WIDTHS)):
        b_bits += (load_keys(p_row, m_s, at, R, WIDTHS[i]),)
        p_c = (p_row + LATENT_SCALES_AT).to(tl.pointer_type(tl.float32)) + i
        b_c += (tl.load(p_c, mask=m_s, other=0.0),)
        at += WIDTHS[i]
    b_rope = 0
    if E > 0:
        b_rope = load_keys((p_row + ROPE_AT).to(tl.pointer_type(ROPE)), m_s, 0, E, BE)
    b_ks = 0
    if p_scales is not None:
        p_ks = rows_at(p_scales, page, o_s, scale_strides, PAGE, ALIGN_SCALES)
        b_ks = load_key_scales(p_ks, m_s, scale_strides[2], HK, BHK)
    return b_bits, b_c, b_rope, b_ks


@triton.jit
def from_e4m3(b_bits, DOT: tl.constexpr, HAS_E4M3: tl.constexpr):
    """The numbers that bytes stand for. Without the type a NaN reads as 480, but then its scale is a NaN."""
    if HAS_E4M3:
        return b_bits.to(tl.float8e4nv, bitcast=True).to(DOT)
    # Sign, exponent and fraction are those of a number in fp16 that is 2^-8 of it: the biases are 8 apart.
    b_signs = (b_bits & 0x80).to(tl.uint16) << 8
    b_half = (b_signs | ((b_bits & 0x7F).to(tl.uint16) << 7)).to(tl.float16, bitcast=True)
    return (b_half.to(tl.float32) * 256.0).to(DOT)


@triton.jit
def latents_of(b_bits, WIDTHS: tl.constexpr, DOT: tl.constexpr, HAS_E4M3: tl.constexpr):
    b_k = ()
    for i in tl.static_range(len(WIDTHS)):
        b_k += (from_e4m3(b_bits[i], DOT, HAS_E4M3),)
    return b_k
