"""mla_absorb: definition, gradients, pages, merged slices, unused memory, registration, rejected inputs."""

import pytest
import torch

from hylo_ops import mla_absorb
from hylo_ops.mla_absorb import reference
from hylo_ops.testing import cast, gradients, within_budget

BACKENDS = ["reference"]
DTYPE = torch.float64
SCALE = 0.4
LEAVES = ("q_nope", "q_rope", "kv_cache", "key_scale")


def make(lengths=(9, 4), T=2, H=4, R=6, E=2, HK=2, S=None, page=None, dtype=DTYPE, seed=0):
    """A contiguous cache, or the same tokens in pages of a random order with pages to spare."""
    g = torch.Generator().manual_seed(seed)
    batch, size = len(lengths), max(*lengths, 1) if S is None else S
    cache = torch.randn(batch, size, R + E + HK, generator=g, dtype=dtype)
    x = {
        "q_nope": torch.randn(batch, T, H, R, generator=g, dtype=dtype),
        "q_rope": torch.randn(batch, T, H, E, generator=g, dtype=dtype),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "cache_starts": None,
        "kv_cache": cache,
        "block_table": None,
    }
    if page is not None:
        x["kv_cache"], x["block_table"] = into_pages(cache, page, g)
    return {**x, "key_scale": x["kv_cache"][..., R + E :]}


def into_pages(cache, page, generator):
    batch, size, row = cache.shape
    per_sequence = -(-size // page)
    order = torch.randperm(batch * per_sequence + 2, generator=generator)[: batch * per_sequence]
    pool = torch.full((batch * per_sequence + 2, page, row), torch.nan, dtype=cache.dtype)
    padded = torch.nn.functional.pad(cache, (0, 0, 0, per_sequence * page - size), value=torch.nan)
    pool[order] = padded.reshape(-1, page, row)
    return pool, order.view(batch, per_sequence).to(torch.int32)


def run(x, backend=None, **options):
    return mla_absorb(**x, scale=SCALE, return_lse=True, backend=backend, **options)


def by_steps(x, causal=True):
    return reference.step_by_step(**x, scale=SCALE, causal=causal)


def close(got, expected, atol=1e-10):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def plain(q_nope, q_rope, kv_cache, cache_seqlens, cache_starts=None, block_table=None, key_scale=None, causal=True):
    """Expanded scores of a contiguous cache and one masked softmax; differentiable, with nothing of ours in it."""
    T, R, E = q_nope.shape[1], q_nope.shape[3], q_rope.shape[3]
    scores = torch.einsum("bthr,bsr->bths", q_nope, kv_cache[..., :R])
    scores = SCALE * (scores + torch.einsum("bthe,bse->bths", q_rope, kv_cache[..., R : R + E]))
    if key_scale is not None:
        factors = key_scale.repeat_interleave(q_nope.shape[2] // key_scale.shape[2], dim=2)
        scores = scores * factors.transpose(1, 2)[:, None]
    limit = cache_seqlens[:, None] - (torch.arange(T).flip(0) if causal else torch.zeros(T, dtype=torch.int32))
    unseen = torch.arange(kv_cache.shape[1]) >= limit[..., None]
    scores = scores.masked_fill(unseen[:, :, None], -torch.inf)
    return torch.einsum("bths,bsr->bthr", scores.softmax(-1), kv_cache[..., :R]), scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "HK", "E"), [(4, 2, 2), (4, 4, 2), (3, 1, 0)])
def test_the_step_form_is_attention(causal, H, HK, E):
    x = make(H=H, HK=HK, E=E)
    close(by_steps(x, causal), plain(**x, causal=causal), atol=1e-12)
    x["key_scale"] = None
    close(by_steps(x, causal), plain(**x, causal=causal), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 1, 16, 700])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_definition(backend, page, T, scaled):
    """Lengths on both sides of a slice's end, over several slices."""
    x = make(lengths=(1111, 512, 513, 3), T=T, page=page)
    if not scaled:
        x["key_scale"] = None
    close(run(x, backend), by_steps(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("H", "HK", "E"), [(4, 1, 2), (6, 3, 0), (1, 1, 4)])
def test_head_counts_and_masks(backend, causal, H, HK, E):
    x = make(lengths=(9, 5), T=5, H=H, HK=HK, E=E, S=20)
    close(run(x, backend, causal=causal), by_steps(x, causal))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_log_sum_is_optional(backend):
    x = make()
    o = mla_absorb(**x, scale=SCALE, backend=backend)
    assert torch.equal(o, run(x, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
def test_tokens_that_see_nothing(backend, page):
    """Sequences of length zero, and new tokens before the first of the sequence."""
    x = make(lengths=(0, 2, 7), T=3, page=page)
    x["q_nope"][0] = torch.nan
    o, lse = run(x, backend)
    blind = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert torch.equal(lse == -torch.inf, blind[..., None].expand(3, 3, 4))
    assert torch.equal(o[blind], torch.zeros_like(o[blind]))
    expected = by_steps(x)
    close((o[~blind], lse[~blind]), (expected[0][~blind], expected[1][~blind]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 3])
def test_left_padding_is_a_shorter_sequence(backend, page):
    """Positions before the start, NaN here, reach neither a result nor a gradient."""
    x, starts = make(lengths=(11, 7, 5)), [4, 0, 5]
    got = {}
    for n, start in enumerate(starts):
        one = {name: x[name][n : n + 1] for name in ("q_nope", "q_rope")}
        one |= {name: x[name][n : n + 1, start:] for name in ("kv_cache", "key_scale")}
        got[n] = run({**x, **one, "cache_seqlens": x["cache_seqlens"][n : n + 1] - start}, backend)
        x["kv_cache"][n, :start] = torch.nan
    if page is not None:
        x["kv_cache"], x["block_table"] = into_pages(x["kv_cache"], page, torch.Generator().manual_seed(1))
    x["key_scale"] = x["kv_cache"][..., 8:]
    x["cache_starts"] = torch.tensor(starts, dtype=torch.int32)
    o, lse = run(x, backend)
    for n in got:
        close((o[n : n + 1], lse[n : n + 1]), got[n])
    close((o, lse), by_steps(x))
    found = gradients(
        lambda **kw: run(kw, backend), {**x, "kv_cache": x["kv_cache"].nan_to_num(9.0)}, ("q_nope", "kv_cache")
    )
    assert torch.isfinite(found["q_nope"]).all()
    assert page is not None or not found["kv_cache"][0, :4].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequence_has_a_token(backend):
    o, lse = run(make(lengths=(0, 0), T=1, S=8), backend)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_new_tokens(backend):
    o, lse = run(make(T=0), backend)
    assert o.shape == (2, 0, 4, 6)
    assert lse.shape == (2, 0, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients(backend, causal):
    """All four inputs apart; one sequence is empty and one token sees nothing."""
    x = make(lengths=(4, 0, 1), S=5)
    x["key_scale"] = x["key_scale"].clone()
    leaves = [x[name].requires_grad_() for name in LEAVES]

    def call(*tensors):
        o, lse = run({**x, **dict(zip(LEAVES, tensors, strict=True))}, backend, causal=causal)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_over_several_slices(backend):
    x = make(lengths=(1111, 600), T=3)
    x["key_scale"] = x["key_scale"].clone()
    got = gradients(lambda **kw: run(kw, backend), x, LEAVES)
    expected = gradients(plain, x, LEAVES)
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_cache_whose_view_is_the_key_scale(backend):
    x = make(lengths=(5, 7))
    x.pop("key_scale")

    def call(q_nope, q_rope, kv_cache, attend, **others):
        return attend(q_nope, q_rope, kv_cache, **others, key_scale=kv_cache[..., 8:])

    def ours(*tensors, **others):
        return mla_absorb(*tensors, **others, scale=SCALE, return_lse=True, backend=backend)

    got = gradients(lambda **kw: call(**kw, attend=ours), x, ("kv_cache",))
    expected = gradients(lambda **kw: call(**kw, attend=plain), x, ("kv_cache",))
    torch.testing.assert_close(got["kv_cache"], expected["kv_cache"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_unused_memory_reaches_nothing(backend, page, garbage):
    """Unused pages, the tail of the last page, and whatever stands in the table past the last page."""
    lengths = (9, 3, 0)
    clean = make(lengths=lengths, S=20, page=page)
    dirty = {**clean, "kv_cache": clean["kv_cache"].nan_to_num().clone()}
    unused = torch.ones(dirty["kv_cache"].shape[:2], dtype=torch.bool)
    for n, length in enumerate(lengths):
        for s in range(length):
            where = (n, s) if page is None else (int(clean["block_table"][n, s // page]), s % page)
            unused[where] = False
    dirty["kv_cache"][unused] = garbage
    if page is not None:
        table = clean["block_table"].clone()
        for n, length in enumerate(lengths):
            table[n, -(-length // page) :] = torch.tensor([-1, 2**31 - 1, -7, 12345, 99], dtype=torch.int32)[
                : 5 - -(-length // page)
            ]
        dirty["block_table"] = table
    dirty["key_scale"] = dirty["kv_cache"][..., 8:]
    close(run(dirty, backend), by_steps(clean))
    dirty["key_scale"] = dirty["key_scale"].clone()

    def finite(**x):
        o, lse = run(x, backend)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    grads = gradients(finite, dirty, LEAVES)
    assert set(grads) == set(LEAVES)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not grads["kv_cache"][unused].any()
    assert not grads["key_scale"][unused].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 511, 512, 700])
def test_two_parts_of_the_cache_merge_into_the_whole(backend, cut):
    """What context parallelism and cascades do with o and lse."""
    x = make(lengths=(800, 1030), T=1)
    whole, lse = run(x, backend)
    parts = []
    for part, lengths in ((slice(cut), [cut, cut]), (slice(cut, None), [800 - cut, 1030 - cut])):
        cache, seqlens = x["kv_cache"][:, part], torch.tensor(lengths, dtype=torch.int32)
        half = {"kv_cache": cache, "key_scale": cache[..., 8:], "cache_seqlens": seqlens}
        parts.append(run({**x, **half}, backend))
    weights = torch.stack([part[1] for part in parts]).softmax(0)[..., None]
    merged = weights[0] * parts[0][0] + weights[1] * parts[1][0]
    close((merged, torch.logaddexp(parts[0][1], parts[1][1])), (whole, lse))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_after_another_equals_all_at_once(backend):
    x = make(lengths=(12, 9), T=7)
    o, lse = run(x, backend)
    for t in range(7):
        now = {name: x[name][:, t : t + 1] for name in ("q_nope", "q_rope")}
        one = run({**x, **now, "cache_seqlens": x["cache_seqlens"] - 6 + t}, backend)
        close(one, (o[:, t : t + 1], lse[:, t : t + 1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 64])
@pytest.mark.parametrize("T", [1, 2])
def test_batch_invariance(backend, page, T):
    """Neither a long neighbour nor the room left in cache or table may change where a short sequence's sums are cut."""
    lengths = (1501, 613, 40)
    x = make(lengths=lengths, T=T, H=3, R=17, E=3, HK=1, page=page, dtype=torch.float32)
    o, lse = run(x, backend, fixed_split=True)
    close((o, lse), run(x, backend), atol=1e-4)
    for n, length in enumerate(lengths):
        alone = {**x, **{name: x[name][n : n + 1] for name in ("q_nope", "q_rope", "cache_seqlens")}}
        if page is None:
            alone |= {name: x[name][n : n + 1, :length] for name in ("kv_cache", "key_scale")}
        else:
            alone["block_table"] = x["block_table"][n : n + 1, : -(-length // page)]
        o_n, lse_n = run(alone, backend, fixed_split=True)
        assert torch.equal(o[n : n + 1], o_n)
        assert torch.equal(lse[n : n + 1], lse_n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_scores(backend, factor):
    x = make(lengths=(700, 30))
    x["q_nope"] *= factor
    o, lse = run(x, backend)
    expected = by_steps(x)
    torch.testing.assert_close(o, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_error_budget(backend, dtype):
    x = make(lengths=(700, 129), T=3, R=32, E=16, H=8, dtype=torch.float32)
    low = cast(x, dtype)
    exact, eager = by_steps(cast(low, DTYPE)), by_steps(low)
    o, lse = run(low, backend)
    assert o.dtype == dtype
    assert lse.dtype == torch.float32
    within_budget(o, eager[0], exact[0], "o")
    within_budget(lse, eager[1], exact[1], "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """Queries side by side in one projection, rows with more behind them, every second page of a pool."""
    x = make(lengths=(9, 4), page=4)
    q = torch.randn(2, 2, 4, 9, dtype=DTYPE)
    pool = x["kv_cache"].new_full((2 * len(x["kv_cache"]), 4, 13), torch.nan)
    pool[::2, :, :10] = x["kv_cache"]
    views = {"q_nope": q[..., :6], "q_rope": q[..., 7:], "kv_cache": pool[::2], "key_scale": pool[::2, :, 8:10]}
    got = run({**x, **views}, backend)
    expected = run({**x, **{name: view.contiguous() for name, view in views.items()}}, backend)
    close(got, expected, atol=1e-12)


@pytest.mark.parametrize("page", [None, 4])
def test_registration(page):
    x = make(lengths=(5, 0), page=page, dtype=torch.float32)
    x["kv_cache"] = x["kv_cache"].nan_to_num()
    x["key_scale"] = x["kv_cache"][..., 8:].clone() if page is None else None
    names = ("q_nope", "q_rope", "kv_cache", "cache_seqlens", "cache_starts", "block_table", "key_scale")
    inputs = [x[name] for name in names]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    torch.library.opcheck(torch.ops.hylo_ops.mla_absorb, (*leaves, SCALE, True, False, None))


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32, page=4)
    x["kv_cache"] = x["kv_cache"].nan_to_num().requires_grad_()
    x.pop("key_scale")

    def step(q_nope):
        o, lse = run({**x, "q_nope": q_nope, "key_scale": x["kv_cache"][..., 8:]})
        return o.square().sum() + lse.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x["q_nope"]), step(x["q_nope"]))
    (grad,) = torch.autograd.grad(compiled(x["q_nope"]), x["kv_cache"])
    (expected,) = torch.autograd.grad(step(x["q_nope"]), x["kv_cache"])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_nope": torch.zeros(2, 4, 6)}, r"q_nope must have shape \[B, T, H, R\], got \[2, 4, 6\]"),
        ({"q_nope": torch.zeros(2, 2, 4, 6, dtype=torch.int32)}, "q_nope must be bfloat16 or .*, got int32"),
        ({"q_rope": torch.zeros(2, 1, 4, 2)}, r"q_rope must have shape \[2, 2, 4, E\], got \[2, 1, 4, 2\]"),
        ({"q_rope": torch.zeros(2, 2, 4, 2, dtype=DTYPE)}, "q_rope must be float32, got float64"),
        ({"kv_cache": torch.zeros(3, 9, 10)}, r"kv_cache must have shape \[2, S, row\], got \[3, 9, 10\]"),
        ({"kv_cache": torch.zeros(2, 9, 7)}, "rows of kv_cache must hold at least 8 values, got 7"),
        ({"cache_seqlens": torch.ones(3, dtype=torch.int32)}, r"cache_seqlens must have shape \[2\], got \[3\]"),
        ({"cache_seqlens": torch.ones(2)}, "cache_seqlens must be int32 or int64, got float32"),
        ({"cache_seqlens": torch.tensor([10, 1])}, "cache_seqlens must be at most 9, .*, got 10"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"block_table must have shape \[2, max pages\]"),
        ({"block_table": torch.zeros(2, 1)}, "block_table must be int32 or int64, got float32"),
        ({"block_table": torch.zeros(2, 0, dtype=torch.int32)}, "cache_seqlens must be at most 0, .*, got 9"),
        ({"key_scale": torch.zeros(2, 8, 2)}, r"key_scale must have shape \[2, 9, HK\], got \[2, 8, 2\]"),
        ({"key_scale": torch.zeros(2, 9, 3)}, "q_nope must be a multiple of the heads of key_scale, got .* 4 and .* 3"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        run({**make(dtype=torch.float32), **change})


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'hip'"):
        run(make(), backend="hip")
