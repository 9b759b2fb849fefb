"""Latent attention out of grouped-query attention: joint SVD of keys and values, one shared rotated key.

The published initialisation is X-EcoMLA's; the aligned one beside it is derived in docs/upcycling.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hylo.config import HyloConfig
from hylo.upcycle.base import AttentionWeights, expected_rms


@dataclass(frozen=True)
class MlaEnergy:
    """Share of the squared singular values that the ranks keep, of queries and of keys with values."""

    query: float
    key_value: float


def published_mla(weights: AttentionWeights, config: HyloConfig) -> tuple[dict[str, Tensor], MlaEnergy]:
    """State dict of an MLA mixer as X-EcoMLA makes it.

    Of each head the first rows become the unrotated part and the last rows the rotated part; the shared rotated key
    is the mean over KV heads.
    Source: arXiv 2503.11132, section 3; arXiv 2604.24715.
    """
    nope, rope, h = config.qk_nope_head_dim, config.qk_rope_head_dim, weights.head_dim
    kept = [*range(nope), *range(h - rope, h)]
    q_up, q_down, query = factor(weights.q, config.q_lora_rank)
    kv_up, kv_down, key_value = factor(torch.cat([weights.k, weights.v]), config.kv_lora_rank)
    up_k, up_v = kv_up.view(2, weights.kv_heads, h, -1)
    state = {
        "q_a_proj.weight": q_down,
        "q_b_proj.weight": q_up.view(weights.heads, h, -1)[:, kept].flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([kv_down, weights.per_head(weights.k)[:, h - rope :].mean(0)]),
        "kv_b_proj.weight": torch.cat([up_k[:, :nope], up_v], dim=1).flatten(0, 1),
        "o_proj.weight": weights.o,
    }
    if weights.q_norm is not None and weights.k_norm is not None:
        state |= {"q_norm.weight": weights.q_norm[kept], "k_norm.weight": weights.k_norm[kept]}
    return state, MlaEnergy(query, key_value)


def aligned_mla(weights: AttentionWeights, config: HyloConfig, moment: Tensor) -> tuple[dict[str, Tensor], MlaEnergy]:
    """State dict of an MLA mixer whose rotated rows keep the frequency that the base rotated them with.

    The shared key of a frequency is the best complex rank-one approximation of all KV heads' keys of that frequency;
    each head's complex coefficient goes into the queries of its group. Both SVDs minimise the error of their outputs
    on inputs of the given second moment, and the joint one spends its rank on the rows that MLA reads.

    Args:
        moment: [D, D]. Second moment E[x xT] of the layer's input.
    """
    nope, rope, h = config.qk_nope_head_dim, config.qk_rope_head_dim, weights.head_dim
    pairs = matched_pairs(h, rope)
    free = [i for i in reversed(range(h // 2)) if i not in pairs]  # slow pairs first: they need a rotation least
    order = [row for i in free for row in (i, i + h // 2)][:nope]
    rotated = [*pairs, *(i + h // 2 for i in pairs)]

    scale = ((nope + rope) / h) ** 0.5  # MLA reads its softmax scale off the width of its own heads
    q, k = weights.per_head(weights.q), weights.per_head(weights.k)
    if weights.q_norm is None or weights.k_norm is None:
        q, norms = q * scale, {}
        q_rope, k_rope = _shared_key(q[:, rotated], k[:, rotated], moment)
    else:
        q, k = q / expected_rms(q, moment), k / expected_rms(k, moment)
        q_rope, k_rope, q_scale, k_scale = _shared_normed_key(
            q[:, rotated], k[:, rotated], weights.q_norm[rotated], weights.k_norm[rotated], moment
        )
        norms = {
            "q_norm.weight": torch.cat([weights.q_norm[order], q_scale]) * scale,
            "k_norm.weight": torch.cat([weights.k_norm[order], k_scale]),
        }
    queries = torch.cat([q[:, order], q_rope], dim=1)
    q_up, q_down, query = factor(queries.flatten(0, 1), config.q_lora_rank, moment)
    joint = torch.cat([k[:, order], weights.per_head(weights.v)], dim=1).flatten(0, 1)
    kv_up, kv_down, key_value = factor(joint, config.kv_lora_rank, moment)
    state = {
        "q_a_proj.weight": q_down,
        "q_b_proj.weight": q_up,
        "kv_a_proj_with_mqa.weight": torch.cat([kv_down, k_rope]),
        "kv_b_proj.weight": kv_up,
        "o_proj.weight": weights.o,
    }
    return state | norms, MlaEnergy(query, key_value)


def matched_pairs(head_dim: int, rope_dim: int) -> list[int]:
    """For each pair of the rope slice the base's pair that turns with the same (or the nearest) frequency.

    Pair i of a head of width h turns by theta^(-2i/h) a token, pair j of a slice of width E by theta^(-2j/E).
    """
    return [(2 * j * head_dim + rope_dim) // (2 * rope_dim) for j in range(rope_dim // 2)]


def factor(matrix: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Best factors of one rank, all singular values in the second: matrix [M, D] ~ up [M, rank] @ down [rank, D].

    Best for inputs of second moment `moment` [D, D], the identity if None. At least float32; ranks beyond the
    matrix's own are zeros.

    Returns:
        up, down, and the kept share of the squared singular values.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    root, inverse = _square_root(moment.to(wide.dtype)) if moment is not None else (None, None)
    u, s, vh = torch.linalg.svd(wide if root is None else wide @ root, full_matrices=False)
    up, down = u[:, :rank], s[:rank, None] * vh[:rank]
    down = down if inverse is None else down @ inverse
    missing = rank - up.shape[1]
    if missing > 0:
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
    energy = s[:rank].square().sum() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
    return up.to(matrix.dtype), down.to(matrix.dtype), float(energy)


def _shared_key(q: Tensor, k: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """q [Hq, E, D], k [Hkv, E, D], rows (j, j + E/2) a pair -> queries [Hq, E, D] for one shared key [E, D]."""
    q_pairs, k_pairs = _to_complex(q), _to_complex(k)
    coefficients, key = _rank_one(q_pairs, k_pairs, moment)
    return _to_real(q_pairs * _per_query(coefficients, q).conj()), _to_real(key[None])[0]


def _shared_normed_key(
    q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, moment: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_shared_key` under a norm of each head: heads may be turned against each other but not rescaled.

    The norm's two weights of a pair must be equal for a turn to commute with them. They become the one number that
    leaves the pair's energy before the norm as it was, so that a head's RMS does not change.

    Returns:
        queries [Hq, E, D], key [E, D], and the two norms' weights [E].
    """
    q_pairs, k_pairs = _to_complex(q * q_norm[:, None]), _to_complex(k * k_norm[:, None])
    coefficients, _ = _rank_one(q_pairs, k_pairs, moment)
    turns = coefficients / coefficients.abs().clamp_min(torch.finfo(k.dtype).tiny)
    weight = _query_energy(q_pairs, k.shape[0], moment)
    key = (weight * turns.conj())[..., None] * k_pairs
    key = key.sum(0) / weight.sum(0)[:, None]
    queries = q_pairs * _per_query(turns, q).conj()

    def rescaled(turned: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        before, after = (_energy(x, moment).mean(0) for x in (_to_complex(raw), turned))
        scale = (after / before.clamp_min(torch.finfo(raw.dtype).tiny)).sqrt()
        return _to_real(turned / scale[:, None]), scale.repeat(2)

    q_rope, q_scale = rescaled(queries, q)
    k_rope, k_scale = rescaled(key[None], k)
    return q_rope, k_rope[0], q_scale, k_scale


def _rank_one(q: Tensor, k: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """k[g, j] ~ coefficient[g, j] * key[j], weighted by the energy of group g's queries at frequency j.

    q [Hq, P, D] and k [Hkv, P, D] complex -> coefficients [Hkv, P] of mean square 1, key [P, D].
    """
    root, inverse = (m.to(k.dtype) for m in _square_root(moment))
    weight = _query_energy(q, k.shape[0], moment).sqrt()
    tiny = torch.finfo(weight.dtype).tiny
    u, s, vh = torch.linalg.svd((weight[..., None] * (k @ root)).transpose(0, 1), full_matrices=False)
    coefficients = u[:, :, 0].T * s[:, 0] / weight.clamp_min(tiny)
    size = coefficients.abs().square().mean(0).sqrt().clamp_min(tiny)
    return coefficients / size, size[:, None] * (vh[:, 0] @ inverse)


def _query_energy(q: Tensor, groups: int, moment: Tensor) -> Tensor:
    """q [Hq, P, D] complex -> [groups, P]"""
    return _energy(q, moment).unflatten(0, (groups, -1)).sum(1)


def _energy(rows: Tensor, moment: Tensor) -> Tensor:
    """E |rows @ x|^2: rows [H, P, D] complex -> [H, P]"""
    return torch.einsum("hpd,de,hpe->hp", rows, moment.to(rows.dtype), rows.conj()).real


def _per_query(coefficients: Tensor, q: Tensor) -> Tensor:
    """[Hkv, P] -> [Hq, P, 1]"""
    return coefficients.repeat_interleave(q.shape[0] // coefficients.shape[0], dim=0)[..., None]


def _to_complex(rows: Tensor) -> Tensor:
    """[H, E, D] -> [H, E/2, D]"""
    return torch.complex(*(half.contiguous() for half in rows.chunk(2, dim=1)))


def _to_real(pairs: Tensor) -> Tensor:
    return torch.cat([pairs.real, pairs.imag], dim=1)


def _square_root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse; directions that inputs never take are kept off zero."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(1e-6 * float(values[-1])).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
