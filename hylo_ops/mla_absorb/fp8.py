"""Rows of a latent cache in fp8: what is where in their bytes, how they are made and read back.

The format, and what it costs in accuracy: docs/mla_absorb.md.
"""

import torch
from torch import Tensor

from hylo_ops import checks

BYTES = torch.uint8  # the dtype by which an op knows such a cache
HALVES = (torch.bfloat16, torch.float16)
GROUP = 128  # latents that share a scale
ALIGNMENT = 16  # bytes: each part begins at a multiple of what one load of a GPU takes
_LATENT = torch.float8_e4m3fn
_LARGEST = torch.finfo(_LATENT).max


def offsets(latent_rank: int) -> tuple[int, int]:
    """Bytes of a row before its scales, and before what follows them."""
    scales = _whole(latent_rank)
    return scales, scales + _whole(_groups(latent_rank) * torch.float32.itemsize)


def fp8_row_bytes(latent_rank: int, rope_width: int, key_scale_heads: int = 0) -> int:
    """Bytes of a cached token in fp8: 656 for 512 + 64, as FlashMLA has it, 208 for 128 + 32.

    Dims: R latent rank, E rope width, HK heads of the key scales.
    Args:
        latent_rank: R.
        rope_width: E; may be 0.
        key_scale_heads: HK; 0 for none.
    Returns:
        bytes: a multiple of 16: R of latents, 4 ceil(R / 128) of scales, 2 (E + HK) of the rest, each of the three
            filled up to a multiple of 16.
    Raises:
        ValueError: a width is negative, or latent_rank is 0.
    Numerics: none.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), README, "FP8 KV Cache": this row for R 512 and E 64.
    """
    if latent_rank < 1 or rope_width < 0 or key_scale_heads < 0:
        got = f"{latent_rank}, {rope_width} and {key_scale_heads}"
        raise ValueError(f"latent_rank must be positive, rope_width and key_scale_heads not negative, got {got}")
    return offsets(latent_rank)[1] + _whole((rope_width + key_scale_heads) * HALVES[0].itemsize)


def fp8_row_parts(kv_cache: Tensor, *, latent_rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Views of what rows in fp8 hold; writing to them writes to the cache.

    Dims: R latent rank, E rope width, HK heads of the key scales.
    Args:
        kv_cache: [..., row] uint8 | float8_e4m3fn. Rows begin at multiples of 16 bytes.
        latent_rank: R.
        dtype: of rope and key scales, bf16 | fp16: that of the queries.
    Returns:
        latent: [..., R] float8_e4m3fn, still to be multiplied by their scales.
        scale: [..., ceil(R / 128)] fp32: the first is of the first 128 latents, and so on.
        rest: [..., n], of dtype: E rope numbers, HK key scales, and what else a row has. `rest[..., E : E + HK]` is
            what `mla_absorb` takes as key_scale.
    Raises:
        ValueError: a dtype above is violated, or rows are too short or not aligned; the message quotes what it got.
    Numerics: none; views without a gradient.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), README, "FP8 KV Cache".
    """
    checks.dtype("kv_cache", kv_cache, (BYTES, _LATENT))
    checks.choice("dtype", dtype, HALVES)
    scales, rest = offsets(latent_rank)
    if kv_cache.shape[-1] < rest:
        raise ValueError(f"rows with {latent_rank} latents must have at least {rest} bytes, got {kv_cache.shape[-1]}")
    if (reason := why_not_aligned(kv_cache)) is not None:
        raise ValueError(reason)
    end = kv_cache.shape[-1] // ALIGNMENT * ALIGNMENT
    latent = kv_cache[..., :latent_rank].view(_LATENT)
    scale = kv_cache[..., scales:rest].view(torch.float32)[..., : _groups(latent_rank)]
    return latent, scale, kv_cache[..., rest:end].view(dtype)


def quantize_kv_cache(rows: Tensor, *, latent_rank: int, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of a latent cache in fp8: latents in e4m3 with an fp32 scale for each 128, all else as it is:

        scale = max |latent| / 448 over the 128;   latent -> e4m3(latent / scale)

    Dims: R latent rank, E rope width, HK heads of the key scales.
    Args:
        rows: [..., R + E + HK] bf16 | fp16 | fp32 | fp64. Latent | rope, rotated | key scales if there are any.
        latent_rank: R.
        dtype: of rope and key scales in the cache, bf16 | fp16: that of the queries; that of rows if None.
    Returns:
        kv_cache: [..., fp8_row_bytes(R, E, HK)] uint8, contiguous: rows for `mla_absorb`, to be written to its cache.
    Raises:
        ValueError: a shape or dtype above is violated; the message quotes it and what it got.
    Numerics: to the nearest; a latent is at most 2^-4 of itself away, or 2^-10 of its scale; a NaN or infinity makes
        NaN of all 128 latents; not differentiable; deterministic: yes.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), README, "FP8 KV Cache".
    """
    checks.dtype("rows", rows, checks.FLOATS)
    dtype = rows.dtype if dtype is None else dtype
    checks.choice("dtype", dtype, HALVES)
    if not 0 < latent_rank <= rows.shape[-1]:
        raise ValueError(f"latent_rank must be 1 to the width of rows ({rows.shape[-1]}), got {latent_rank}")
    rows = rows.detach()
    others = rows.shape[-1] - latent_rank
    made = rows.new_zeros(*rows.shape[:-1], fp8_row_bytes(latent_rank, others), dtype=BYTES)
    latent, scale, rest = fp8_row_parts(made, latent_rank=latent_rank, dtype=dtype)
    groups = _grouped(rows[..., :latent_rank].float())
    tiny = torch.finfo(torch.float32).tiny  # of latents that all are zero: not 0 / 0
    scale.copy_((groups.abs().amax(-1) / _LARGEST).clamp(min=tiny))
    # A quotient may be rounded above the largest number there is, and would become NaN.
    quotients = (groups / scale[..., None]).clamp(-_LARGEST, _LARGEST).flatten(-2)
    latent.copy_(quotients[..., :latent_rank])
    rest[..., :others].copy_(rows[..., latent_rank:])
    return made


def dequantize_kv_cache(
    kv_cache: Tensor, *, latent_rank: int, width: int, dtype: torch.dtype, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """What rows in fp8 stand for: latents times their scales, then all else.

    Dims: R latent rank, E rope width, HK heads of the key scales.
    Args:
        kv_cache: [..., row] uint8 | float8_e4m3fn, as `quantize_kv_cache` makes it. Rows begin at multiples of 16
            bytes.
        latent_rank: R.
        width: R + E, or R + E + HK: how many numbers of a row are wanted.
        dtype: of rope and key scales in the cache, bf16 | fp16.
        out_dtype: of the result.
    Returns:
        rows: [..., width], of out_dtype. Latent | rope | key scales.
    Raises:
        ValueError: a dtype above is violated, or rows are too short or not aligned; the message quotes what it got.
    Numerics: the products are rounded once, to out_dtype (fp64: exact); no gradient; deterministic: yes.
    Source: FlashMLA (github.com/deepseek-ai/FlashMLA), README, "FP8 KV Cache".
    """
    checks.dtype("kv_cache", kv_cache, (BYTES, _LATENT))
    needed = fp8_row_bytes(latent_rank, width - latent_rank)
    if kv_cache.shape[-1] < needed:
        raise ValueError(f"rows of {width} numbers must have at least {needed} bytes, got {kv_cache.shape[-1]}")
    latent, scale, rest = fp8_row_parts(kv_cache, latent_rank=latent_rank, dtype=dtype)
    compute = torch.promote_types(out_dtype, torch.float32)
    products = _grouped(latent.to(compute)) * scale[..., None]
    return torch.cat(
        [products.flatten(-2)[..., :latent_rank].to(out_dtype), rest[..., : width - latent_rank].to(out_dtype)], dim=-1
    )


def why_not_aligned(kv_cache: Tensor) -> str | None:
    """The reason why the parts of rows cannot be seen as what they are, or None."""
    steps = [step for step, size in zip(kv_cache.stride()[:-1], kv_cache.shape[:-1], strict=True) if size > 1]
    begin = 0 if torch.compiler.is_compiling() else kv_cache.storage_offset()  # a graph has none to show
    if kv_cache.stride(-1) != 1 or any(step % ALIGNMENT for step in (begin, *steps)):
        return (
            f"the rows of an fp8 kv_cache must be contiguous and begin at multiples of {ALIGNMENT} bytes, got strides "
            f"{list(kv_cache.stride())} behind {begin} bytes"
        )
    return None


def _whole(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _groups(latent_rank: int) -> int:
    return -(-latent_rank // GROUP)


def _grouped(latents: Tensor) -> Tensor:
    """[..., ceil(R / 128), 128]; zeros fill up the last one."""
    missing = -latents.shape[-1] % GROUP
    return torch.nn.functional.pad(latents, (0, missing)).unflatten(-1, (-1, GROUP))
