"""fused.mla_step: equals an expanded attention layer, what it writes, pages, padding, registration, rejected inputs."""

import pytest
import torch

from hylo_ops import mla_absorb
from hylo_ops.fused import mla, mla_step
from hylo_ops.testing import cast, within_budget
from tests.ops.mla_step_cases import OPTIONAL, TENSORS

BACKENDS = ["reference", "composed"]
DTYPE = torch.float64
SCALE = 0.35
B, H, HK, NOPE, R, E, V, S = 3, 6, 2, 4, 5, 4, 3, 12


def make(lengths=(9, 1, 12), scales=0, extra=0, page=None, E=E, dtype=DTYPE, seed=0):
    """What one layer holds at a decode step; the slots past the old tokens are NaN."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    seqlens = torch.tensor(lengths, dtype=torch.int32)
    row = R + E + scales + extra
    cache, table = normal(B, S, row), None
    cache[torch.arange(S) >= seqlens[:, None] - 1] = torch.nan
    if page is not None:
        order = torch.randperm(B * S // page, generator=g)
        pool = torch.empty_like(cache).view(-1, page, row)
        pool[order] = cache.view(-1, page, row)
        cache, table = pool, order.view(B, -1).to(torch.int32)
    angle = normal(B, 1, E // 2)
    return {
        "q_nope": normal(B, 1, H, NOPE),
        "q_rope": normal(B, 1, H, E),
        "kv_new": normal(B, 1, row),
        "w_uk": normal(HK, NOPE, R),
        "w_uv": normal(HK, V, R),
        "kv_cache": cache,
        "cache_seqlens": seqlens,
        "position": seqlens - 1,
        "cos": 1.3 * angle.cos().repeat(1, 1, 2),
        "sin": 1.3 * angle.sin().repeat(1, 1, 2),
        "block_table": table,
        "key_scale": scales or None,
    }


def run(x, backend=None):
    """The composition is the function behind the backend of that name, which runs on GPUs only."""
    if backend == "composed":
        return mla._composed(*(x.get(name) for name in (*TENSORS, *OPTIONAL)), SCALE, x["key_scale"])
    return mla_step(**x, scale=SCALE, backend=backend)


def rotate(u, cos, sin):
    half = u.shape[-1] // 2
    first, second = u[..., :half], u[..., half:]
    c, s = cos[..., :half], sin[..., :half]
    return torch.cat([first * c - second * s, second * c + first * s], dim=-1)


def token_rows(cache, table, n, length):
    return (cache[n] if table is None else cache[table[n].long()].flatten(0, 1))[:length]


def expanded(x, n):
    """Sequence n: keys and values of every head built from the latents, then ordinary attention. -> [H, V], the row"""
    length, rope = int(x["cache_seqlens"][n]), x["q_rope"].shape[3]
    new = x["kv_new"][n, 0].clone()
    new[R : R + rope] = rotate(new[R : R + rope], x["cos"][n, 0], x["sin"][n, 0])
    rows = torch.cat([token_rows(x["kv_cache"], x["block_table"], n, length - 1), new[None]])
    outputs = []
    for h in range(H):
        kv_head = h // (H // HK)
        key = torch.cat([rows[:, :R] @ x["w_uk"][kv_head].mT, rows[:, R : R + rope]], dim=-1)
        query = torch.cat([x["q_nope"][n, 0, h], rotate(x["q_rope"][n, 0, h], x["cos"][n, 0], x["sin"][n, 0])])
        scores = SCALE * key @ query
        if x["key_scale"]:
            scores = scores * rows[:, R + rope + h // (H // x["key_scale"])]
        outputs.append(scores.softmax(0) @ (rows[:, :R] @ x["w_uv"][kv_head].mT))
    return torch.stack(outputs), new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize(("scales", "extra", "rope"), [(0, 0, E), (2, 0, E), (1, 3, E), (0, 2, 0), (6, 0, 2)])
def test_equals_expanded_attention(backend, page, scales, extra, rope):
    x = make(scales=scales, extra=extra, page=page, E=rope)
    before = {**x, "kv_cache": x["kv_cache"].clone()}
    o = run(x, backend)
    assert o.shape == (B, 1, H, V)
    for n in range(B):
        expected, new = expanded(before, n)
        torch.testing.assert_close(o[n, 0], expected, rtol=0, atol=1e-10)
        length = int(x["cache_seqlens"][n])
        rows = token_rows(x["kv_cache"], x["block_table"], n, S)
        torch.testing.assert_close(rows[length - 1], new, rtol=0, atol=1e-12)
        assert torch.equal(rows[: length - 1], token_rows(before["kv_cache"], x["block_table"], n, length - 1))
        assert torch.isnan(rows[length:]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_operator_it_joins(backend):
    """With key_scale as the view of the cache that the number stands for."""
    x = make(scales=2, page=4)
    o = run(x, backend)
    per_kv_head = (HK, H // HK)
    q = torch.einsum("btgqn,gnr->btgqr", x["q_nope"].unflatten(2, per_kv_head), x["w_uk"]).flatten(2, 3)
    latent = mla_absorb(
        q,
        rotate(x["q_rope"], x["cos"][:, :, None], x["sin"][:, :, None]),
        x["kv_cache"],
        cache_seqlens=x["cache_seqlens"],
        scale=SCALE,
        block_table=x["block_table"],
        key_scale=x["kv_cache"][..., R + E :],
    )
    expected = torch.einsum("btgqr,gvr->btgqv", latent.unflatten(2, per_kv_head), x["w_uv"]).flatten(2, 3)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
def test_padding_writes_nothing_and_gives_zeros(backend, page):
    x = make(page=page)
    x["position"] = torch.tensor([8, -1, 11])
    x["q_nope"][1] = torch.nan
    if page is not None:
        x["block_table"][1] = -1
    before = x["kv_cache"].clone()
    o = run(x, backend)
    assert torch.equal(o[1], torch.zeros_like(o[1]))
    assert torch.isfinite(o).all()
    changed = (x["kv_cache"].nan_to_num(1e9) != before.nan_to_num(1e9)).any(-1)
    assert int(changed.sum()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
def test_step_after_step_fills_an_empty_cache(backend, page):
    """Decode from nothing equals one causal call over the rows that it wrote."""
    x = make(page=page)
    x["kv_cache"].fill_(torch.nan)
    queries, outputs = [], []
    for t in range(S):
        now = make(seed=t + 1)
        now = {name: now[name] for name in ("q_nope", "q_rope", "kv_new", "cos", "sin")}
        step = {**x, **now, "cache_seqlens": torch.full((B,), t + 1), "position": torch.full((B,), t)}
        queries.append((now["q_nope"], rotate(now["q_rope"], now["cos"][:, :, None], now["sin"][:, :, None])))
        outputs.append(run(step, backend))
    q_nope, q_rope = (torch.cat(parts, dim=1) for parts in zip(*queries, strict=True))
    per_kv_head = (HK, H // HK)
    q = torch.einsum("btgqn,gnr->btgqr", q_nope.unflatten(2, per_kv_head), x["w_uk"]).flatten(2, 3)
    seqlens = torch.full((B,), S)
    o = mla_absorb(q, q_rope, x["kv_cache"], cache_seqlens=seqlens, scale=SCALE, block_table=x["block_table"])
    expected = torch.einsum("btgqr,gvr->btgqv", o.unflatten(2, per_kv_head), x["w_uv"]).flatten(2, 3)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_table_of_angles_for_the_whole_batch(backend):
    x = make(lengths=(5, 5, 5))
    shared = {name: x[name][:1] for name in ("cos", "sin")}
    repeated = {name: table.expand(B, 1, E) for name, table in shared.items()}
    one, other = x["kv_cache"].clone(), x["kv_cache"].clone()
    assert torch.equal(
        run({**x, **shared, "kv_cache": one}, backend), run({**x, **repeated, "kv_cache": other}, backend)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(backend, dtype):
    """Against the unfused layer in the same dtype."""
    x = cast(make(scales=2, dtype=torch.float32), dtype)
    exact = torch.stack([expanded(cast(x, DTYPE), n)[0] for n in range(B)])
    eager = torch.stack([expanded(x, n)[0] for n in range(B)])
    o = run(x, backend)
    assert o.dtype == dtype
    within_budget(o[:, 0], eager, exact, "o")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """Queries as halves of one projection, a cache that is one layer's slice of a larger pool."""
    x = make(scales=2)
    q, pool = torch.randn(B, 1, H, NOPE + E, dtype=DTYPE), torch.full((B, S, 2, R + E + 2), torch.nan, dtype=DTYPE)
    pool[:, :, 1] = x["kv_cache"]
    views = {"q_nope": q[..., :NOPE], "q_rope": q[..., NOPE:], "kv_cache": pool[:, :, 1]}
    o = run({**x, "q_nope": q[..., :NOPE].contiguous(), "q_rope": q[..., NOPE:].contiguous()}, backend)
    torch.testing.assert_close(run({**x, **views}, backend), o, rtol=0, atol=1e-12)
    torch.testing.assert_close(pool[:, :, 1], x["kv_cache"], rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(pool[:, :, 0]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
def test_left_padding(backend, page):
    """What stands before the start of a sequence, NaN or not, changes nothing."""
    x = make(scales=2, page=page)
    starts = torch.tensor([2, 0, 1], dtype=torch.int32)[: len(x["cache_seqlens"])].minimum(x["cache_seqlens"] - 1)
    clean, dirty = x["kv_cache"].nan_to_num(5.0), x["kv_cache"].nan_to_num(5.0)
    for n, start in enumerate(starts.tolist()):
        for t in range(start):
            if page is None:
                dirty[n, t] = torch.nan
            else:
                dirty[x["block_table"][n, t // page].long(), t % page] = torch.nan
    one, other = (run({**x, "kv_cache": c, "cache_starts": starts}, backend) for c in (clean, dirty))
    assert torch.equal(one, other)
    unpadded = run({**x, "kv_cache": clean}, backend)
    assert not torch.allclose(one, unpadded)


@pytest.mark.parametrize("page", [None, 4])
def test_registration(page):
    x = make(scales=2, page=page, dtype=torch.float32)
    x["kv_cache"] = x["kv_cache"].nan_to_num()
    table, key_scale = x.pop("block_table"), x.pop("key_scale")
    torch.library.opcheck(torch.ops.hylo_ops.mla_step, (*x.values(), None, table, SCALE, key_scale, None))


def test_compiles_without_a_graph_break():
    x = make(scales=2, page=4, dtype=torch.float32)
    ours, eager = x["kv_cache"].clone(), x["kv_cache"].clone()

    def step(cache):
        o = run({**x, "kv_cache": cache})
        return o, cache[x["block_table"][:, 0].long(), 0].sum()  # reads what the step has just written

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ours), step(eager))
    torch.testing.assert_close(ours, eager, equal_nan=True)
    assert not torch.equal(ours.nan_to_num(), x["kv_cache"].nan_to_num())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_nope": torch.zeros(B, 2, H, NOPE)}, r"q_nope must have shape \[B, 1, H, nope\], got \[3, 2, 6, 4\]"),
        ({"q_rope": torch.zeros(B, 1, H, 3)}, "q_rope must have an even width, got 3"),
        ({"q_rope": torch.zeros(B, 1, H, E, dtype=DTYPE)}, "q_rope must be float32, got float64"),
        ({"w_uk": torch.zeros(HK, 3, R)}, r"w_uk must have shape \[HK, 4, R\], got \[2, 3, 5\]"),
        ({"w_uv": torch.zeros(HK, V, 4)}, r"w_uv must have shape \[2, v, 5\], got \[2, 3, 4\]"),
        ({"w_uk": torch.zeros(4, 4, R), "w_uv": torch.zeros(4, V, R)}, "heads of w_uk, got .* 6 and .* 4"),
        ({"key_scale": 4}, "heads of q_nope must be a multiple of key_scale, got .* 6 and key_scale 4"),
        ({"key_scale": 0}, "heads of q_nope must be a multiple of key_scale, got .* 6 and key_scale 0"),
        ({"key_scale": 2}, "rows of kv_cache must hold at least 11 values, got 9"),
        ({"kv_new": torch.zeros(B, 1, 8)}, r"kv_new must have shape \[3, 1, 9\], got \[3, 1, 8\]"),
        ({"position": torch.zeros(B)}, "position must be int32 or int64, got float32"),
        ({"position": torch.zeros(2, dtype=torch.int32)}, r"position must have shape \[3\], got \[2\]"),
        ({"cos": torch.zeros(B, 1, E // 2)}, r"cos must have shape \[3, 1, 4\], got \[3, 1, 2\]"),
        ({"sin": torch.zeros(2, 1, E)}, r"sin must have shape \[3, 1, 4\], got \[2, 1, 4\]"),
        ({"cache_seqlens": torch.tensor([13, 1, 1])}, "cache_seqlens must be at most 12, .*, got 13"),
    ],
)
def test_rejected_inputs(change, message):
    x = make(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        run({**x, **change})


@pytest.mark.parametrize("backend", ["cuda", "triton", "composed"])
def test_a_named_backend_says_why_it_cannot_run(backend):
    with pytest.raises(NotImplementedError, match=f"{backend}: q_nope is on cpu, not on a CUDA device"):
        mla_step(**make(), scale=SCALE, backend=backend)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("position", [(-1, 0, 11), (-1, -1, -1)])
def test_the_composition_writes_what_the_reference_writes(page, position):
    """Padding first: it must not write where the others do."""
    x = make(page=page)
    x["position"] = torch.tensor(position)
    if page is not None:
        x["block_table"][0] = -1
    ours, other = x["kv_cache"].clone(), x["kv_cache"].clone()
    torch.testing.assert_close(run({**x, "kv_cache": ours}, "composed"), run({**x, "kv_cache": other}))
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-12, equal_nan=True)
