"""mla_prefill: definition, slices, pages, merged parts, absorption, unused memory, room taken, rejected inputs."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_ops import mla_absorb, mla_prefill
from hylo_ops.mla_prefill import engines, reference, sliced
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.layouts import shifted
from tests.ops.test_mla_absorb import into_pages

BACKENDS = ["sliced", "reference"]
DTYPE = torch.float64
SCALE = 0.4
LEAVES = ("q_nope", "q_rope", "kv_cache", "w_uk", "w_uv", "key_scale")
NAMES = ("q_nope", "q_rope", "kv_cache", "w_uk", "w_uv", "block_table", "key_scale")
ENGINES = ["cpu", "eager"]


def make(lengths=(40, 23), T=5, H=4, HK=2, N=6, R=5, E=2, V=8, S=None, page=None, dtype=DTYPE, seed=0):
    """A contiguous cache, or the same tokens in pages of a random order with pages to spare. N + E is V: one width."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    cache = draw(len(lengths), max(*lengths, 1) if S is None else S, R + E + HK)
    x = {
        "q_nope": draw(len(lengths), T, H, N),
        "q_rope": draw(len(lengths), T, H, E),
        "kv_cache": cache,
        "w_uk": draw(HK, N, R) / R**0.5,
        "w_uv": draw(HK, V, R) / R**0.5,
        "lengths": list(lengths),
        "block_table": None,
    }
    if page is not None:
        x["kv_cache"], x["block_table"] = into_pages(cache, page, g)
    return {**x, "key_scale": x["kv_cache"][..., R + E :]}


def run(x, backend="sliced", slice_tokens=16, **options):
    return mla_prefill(**x, scale=SCALE, slice_tokens=slice_tokens, return_lse=True, backend=backend, **options)


def close(got, expected, atol=1e-10):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def plain(q_nope, q_rope, kv_cache, w_uk, w_uv, lengths, block_table=None, key_scale=None):
    """One query after the other over a contiguous cache, in the inputs' dtype, with nothing of ours in it."""
    B, T, H, _ = q_nope.shape
    HK, V, R = w_uv.shape
    o, lse = q_nope.new_zeros(B, T, H, V), torch.full((B, T, H), -torch.inf, dtype=q_nope.dtype)
    for b in range(B):
        for t in range(T):
            seen = lengths[b] - T + t + 1
            for h in range(H if seen > 0 else 0):
                g = h * HK // H
                latent, rope = kv_cache[b, :seen, :R], kv_cache[b, :seen, R : R + q_rope.shape[3]]
                scores = SCALE * ((latent @ w_uk[g].T) @ q_nope[b, t, h] + rope @ q_rope[b, t, h])
                if key_scale is not None:
                    scores = scores * key_scale[b, :seen, g]
                o[b, t, h], lse[b, t, h] = scores.softmax(0) @ (latent @ w_uv[g].T), scores.logsumexp(0)
    return o, lse


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each of the two engines a CPU has; the eager one three queries at a time."""
    monkeypatch.setattr(sliced, "attend", getattr(engines, request.param))
    monkeypatch.setattr(engines, "_SCORES", 3 * 4 * 64)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("H", "HK", "E", "V"), [(4, 2, 2, 8), (4, 4, 2, 3), (3, 1, 0, 7)])
@pytest.mark.parametrize("scaled", [True, False])
def test_equals_the_definition(backend, H, HK, E, V, scaled):
    """Widths of keys and values that agree, and that do not."""
    x = make(H=H, HK=HK, E=E, V=V)
    if not scaled:
        x["key_scale"] = None
    close(run(x, backend), plain(**x), atol=1e-11)


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("slice_tokens", [7, 8, 1000])
@pytest.mark.parametrize("T", [1, 8, 19, 40])
def test_slices_equal_one_softmax(page, slice_tokens, T, engine):
    """Slices that divide the lengths and that do not, chunks longer and shorter than one, one token, no context."""
    x = make(lengths=(40, 64), T=T, page=page)
    close(run(x, slice_tokens=slice_tokens), run(x, "reference"))


@pytest.mark.parametrize("page", [1, 48])
def test_slices_of_one_token(page, engine):
    """Pages of one token, and pages that many slices share."""
    x = make(lengths=(17, 12), T=9, page=page)
    close(run(x, slice_tokens=1), run(x, "reference"))


@pytest.mark.parametrize("page", [None, 16])
def test_eight_heads_serve_thirty_two(page, engine):
    x = make(lengths=(70, 48), T=20, H=32, HK=8, N=4, E=4, V=8, page=page)
    close(run(x), run(x, "reference"))
    contiguous = make(lengths=(70, 48), T=20, H=32, HK=8, N=4, E=4, V=8)
    close(run(x), run(contiguous), atol=1e-12)


@pytest.mark.parametrize("page", [None, 8])
def test_equals_absorbed_attention(page):
    """The key up-projection can go to the query, the value's to the output."""
    x = make(lengths=(600, 41), T=6, page=page)
    w_uk, w_uv = (x[name].repeat_interleave(2, 0) for name in ("w_uk", "w_uv"))
    latent, lse = mla_absorb(
        torch.einsum("bthn,hnr->bthr", x["q_nope"], w_uk),
        x["q_rope"],
        x["kv_cache"],
        cache_seqlens=torch.tensor(x["lengths"]),
        scale=SCALE,
        block_table=x["block_table"],
        key_scale=x["key_scale"],
        return_lse=True,
    )
    close(run(x, slice_tokens=64), (torch.einsum("bthr,hvr->bthv", latent, w_uv), lse))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 4])
def test_tokens_that_see_nothing(backend, page):
    """Sequences without a token, and more queries than a sequence has tokens."""
    x = make(lengths=(0, 3, 20), T=5, page=page)
    x["q_nope"][0] = torch.nan
    o, lse = run(x, backend)
    blind = torch.tensor([[True] * 5, [True, True, False, False, False], [False] * 5])
    assert torch.equal(lse == -torch.inf, blind[..., None].expand(3, 5, 4))
    assert torch.equal(o[blind], torch.zeros_like(o[blind]))
    expected = plain(**make(lengths=(0, 3, 20), T=5))
    close((o[~blind], lse[~blind]), (expected[0][~blind], expected[1][~blind]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths", "T"), [((), 3), ((0, 0), 3), ((9, 4), 0)])
def test_nothing_to_do(backend, lengths, T):
    x = make(lengths=lengths or (1,), T=T, S=9)
    if not lengths:
        x |= {name: x[name][:0] for name in ("q_nope", "q_rope", "kv_cache", "key_scale")}
        x["lengths"] = []
    o, lse = run(x, backend)
    assert o.shape == (len(lengths), T, 4, 8)
    assert torch.equal(lse, torch.full((len(lengths), T, 4), -torch.inf, dtype=DTYPE))


def test_a_part_that_saw_nothing_changes_nothing():
    """Merged in either order, and with another of its kind, which gives nothing again and no NaN."""
    part, part_lse = (
        torch.randn(3, 2, 4),
        torch.tensor([[0.5, -torch.inf], [-200.0, 300.0], [-torch.inf, 0.0]]).double(),
    )
    part = part.masked_fill((part_lse == -torch.inf)[..., None], 0)
    nothing, nothing_lse = torch.zeros_like(part), torch.full_like(part_lse, -torch.inf)
    for one, other in (((part, part_lse), (nothing, nothing_lse)), ((nothing, nothing_lse), (part, part_lse))):
        o, lse = one[0].clone(), one[1].clone()
        sliced.merge_(o, lse, *other)
        assert torch.equal(o, part)
        assert torch.equal(lse, part_lse)


def test_cudnn_is_called_as_its_schema_has_it():
    """Without a GPU: PyTorch's own shapes of the results, grouped heads and two widths."""
    q, k, v = (torch.empty(1, heads, n, w, device="meta") for heads, n, w in ((8, 5, 96), (2, 9, 96), (2, 9, 64)))
    o, lse = engines.cudnn(q, k, v, SCALE, False)
    assert o.shape == (5, 8, 64)
    assert lse.shape == (5, 8)


def test_a_nan_is_not_merged_away():
    x = make()
    x["kv_cache"][0, 3] = torch.nan
    o, lse = run(x)
    assert torch.isnan(o[0]).all()
    assert torch.isnan(lse[0]).all()
    assert torch.isfinite(o[1]).all()


@pytest.mark.parametrize("factor", [1e4, -1e4])
def test_large_scores(factor, engine):
    x = make()
    x["q_nope"] *= factor
    (o, lse), expected = run(x), run(x, "reference")
    torch.testing.assert_close(o, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 8])
def test_unused_memory_reaches_nothing(backend, page):
    """Unused pages, the tail of the last page, and whatever stands in the table past the last page."""
    x = make(lengths=(40, 21), S=64, page=page)
    clean = run(make(lengths=(40, 21), S=64), backend)
    if page is None:
        x["kv_cache"][0, 40:] = x["kv_cache"][1, 21:] = torch.nan
    else:
        x["kv_cache"][x["block_table"][1, 2], 5:] = torch.nan
        x["block_table"][0, 5:] = torch.tensor([-1, 2**31 - 1, 12345], dtype=torch.int32)
        x["kv_cache"][x["block_table"][1, 3:].long()] = torch.nan
    close(run(x, backend), clean, atol=1e-12)


@pytest.mark.parametrize("page", [None, 4])
def test_chunk_after_chunk_equals_all_at_once(page):
    x = make(lengths=(31, 26), T=21, page=page)
    o, lse = run(x)
    for first, last in ((0, 10), (10, 11), (11, 21)):
        now = {name: x[name][:, first:last] for name in ("q_nope", "q_rope")}
        part = run({**x, **now, "lengths": [length - 21 + last for length in x["lengths"]]})
        close(part, (o[:, first:last], lse[:, first:last]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("V", [32, 48])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(backend, V, dtype):
    """Against eager PyTorch in the same dtype, over forty slices of 8 tokens and one of all."""
    x = cast(make(lengths=(320, 65), T=3, N=16, E=16, R=24, V=V, dtype=torch.float32), dtype)
    eager, exact = plain(**x), plain(**cast(x, DTYPE))
    for slice_tokens in (8, 4096):
        o, lse = run(x, backend, slice_tokens)
        assert o.dtype == dtype
        assert lse.dtype == torch.float32
        within_budget(o, eager[0], exact[0], "o")
        within_budget(lse, eager[1], exact[1], "lse")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_differ(backend):
    """Queries of another dtype than cache and weights."""
    x = make(dtype=torch.float32)
    for dtype in (torch.bfloat16, DTYPE):
        changed = {name: x[name].to(dtype) for name in ("q_nope", "q_rope")}
        o, lse = run({**x, **changed}, backend)
        assert o.dtype == dtype
        assert lse.dtype == (DTYPE if dtype == DTYPE else torch.float32)
        torch.testing.assert_close(o.float(), run(x, backend)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """Queries side by side in one projection, every second page of a pool, weights out of one matrix, odd addresses."""
    x = make(page=4)
    q, pool = torch.randn(2, 5, 4, 9, dtype=DTYPE), x["kv_cache"].new_full((2 * len(x["kv_cache"]), 4, 13), torch.nan)
    pool[::2, :, :9] = x["kv_cache"]
    weights = torch.randn(2, 14, 5, dtype=DTYPE)
    views = {"q_nope": q[..., :6], "q_rope": q[..., 7:], "kv_cache": pool[::2], "key_scale": pool[::2, :, 7:9]}
    views |= {"w_uk": weights[:, :6], "w_uv": weights[:, 6:]}
    expected = run({**x, **{name: view.contiguous() for name, view in views.items()}}, backend)
    close(run({**x, **views}, backend), expected, atol=1e-12)
    odd = {name: shifted(x[name]) for name in ("q_rope", "w_uk", "w_uv")}
    for name, t in odd.items():
        t.copy_(x[name])
    close(run({**x, **{name: t.to(DTYPE) for name, t in odd.items()}}, backend), run(x, backend), atol=1e-5)


def test_gradients():
    x = make(lengths=(12, 2), T=3, S=13)
    x["key_scale"] = x["key_scale"].clone()
    call = {backend: lambda backend=backend, **kw: _finite(*run(kw, backend)) for backend in BACKENDS}
    expected = gradients(lambda **kw: _finite(*plain(**kw)), x, LEAVES)
    for backend in BACKENDS:
        got = gradients(call[backend], x, LEAVES)
        assert set(got) == set(LEAVES)
        close((got[name] for name in LEAVES), (expected[name] for name in LEAVES))


def _finite(o, lse):
    return o, lse.masked_fill(lse == -torch.inf, 0)


class _Largest(TorchDispatchMode):
    """The most numbers a new tensor has; views of the inputs are none."""

    def __init__(self, inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in results if isinstance(results, tuple | list) else (results,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, t.numel())
        return results


@pytest.mark.parametrize("page", [None, 16])
def test_memory_does_not_grow_with_the_context(page, engine):
    """The largest tensor made is one slice's keys and values; all queries' scores of a slice would be twice that."""
    largest = {}
    for length in (256, 1024):
        x = make(lengths=(length,), T=16, page=page)
        inputs = [x[name] for name in NAMES]
        with _Largest(inputs) as seen:
            sliced.forward(*inputs, x["lengths"], SCALE, 64)
        largest[length] = seen.numbers
    assert largest[256] == largest[1024] == 64 * 2 * (6 + 2 + 8)
    with _Largest(inputs) as seen:
        reference.mla_prefill(*inputs, x["lengths"], SCALE, 64)
    assert seen.numbers > 10 * largest[1024]


def test_two_million_tokens():
    """One page again and again: the same softmax, and a sum of exponentials that many times as large."""
    x = make(lengths=(256,), T=1, H=2, HK=1, N=2, E=2, R=4, V=4, page=256, dtype=torch.float32)
    o, lse = run(x)
    table = x["block_table"].expand(1, 2**13)
    o_long, lse_long = run({**x, "block_table": table, "lengths": [2**21]}, slice_tokens=2**16)
    close((o_long, lse_long), (o, lse + 13 * math.log(2)), atol=2e-5)


def test_a_pool_beyond_two_billion_elements():
    """The last pages of a pool whose offsets need 64 bits; nothing else of it is ever touched."""
    x = make(lengths=(40,), R=50, N=14, page=16, dtype=torch.bfloat16)
    pages, row = len(x["kv_cache"]), 64
    pool = torch.empty(2**31 // (16 * row) + pages, 16, row, dtype=torch.bfloat16)
    pool[-pages:, :, : x["kv_cache"].shape[2]] = x["kv_cache"]
    far = {"kv_cache": pool, "key_scale": pool[..., 52:54], "block_table": x["block_table"] + (len(pool) - pages)}
    for one, other in zip(run({**x, **far}), run(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("page", "backend"), [(None, "reference"), (4, None)])
def test_registration(page, backend):
    x = make(lengths=(9, 0), T=2, page=page, dtype=torch.float32)
    x["kv_cache"] = x["kv_cache"].nan_to_num()
    x["key_scale"] = x["kv_cache"][..., 7:].clone() if page is None else None
    leaves = [x[name] for name in NAMES]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves]
    torch.library.opcheck(torch.ops.hylo_ops.mla_prefill, (*leaves, x["lengths"], SCALE, 4, backend))


def test_compiles_without_a_graph_break():
    x = make(dtype=torch.float32)
    compiled = torch.compile(
        lambda q_nope, lengths: run({**x, "q_nope": q_nope, "lengths": lengths}), fullgraph=True, backend="aot_eager"
    )
    for lengths in ([40, 23], [17, 31]):
        close(compiled(x["q_nope"], lengths), run({**x, "lengths": lengths}), atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_nope": torch.zeros(2, 4, 6)}, r"q_nope must have shape \[B, T, H, N\], got \[2, 4, 6\]"),
        ({"q_nope": torch.zeros(2, 5, 4, 6, dtype=torch.int32)}, "q_nope must be bfloat16 or .*, got int32"),
        ({"q_rope": torch.zeros(2, 1, 4, 2)}, r"q_rope must have shape \[2, 5, 4, E\], got \[2, 1, 4, 2\]"),
        ({"q_rope": torch.zeros(2, 5, 4, 2, dtype=DTYPE)}, "q_rope must be float32, got float64"),
        ({"w_uk": torch.zeros(2, 7, 5)}, r"w_uk must have shape \[HK, 6, R\], got \[2, 7, 5\]"),
        ({"w_uk": torch.zeros(2, 6, 5, dtype=torch.int8)}, "w_uk must be bfloat16 or .*, got int8"),
        ({"w_uv": torch.zeros(2, 8, 4)}, r"w_uv must have shape \[2, V, 5\], got \[2, 8, 4\]"),
        ({"w_uk": torch.zeros(3, 6, 5), "w_uv": torch.zeros(3, 8, 5)}, "heads of w_uk, got .* 4 and .* 3"),
        ({"kv_cache": torch.zeros(3, 9, 10)}, r"kv_cache must have shape \[2, S, row\], got \[3, 9, 10\]"),
        ({"kv_cache": torch.zeros(2, 40, 6)}, "rows of kv_cache must hold at least 7 values, got 6"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, r"block_table must have shape \[2, max pages\]"),
        ({"block_table": torch.zeros(2, 1)}, "block_table must be int32 or int64, got float32"),
        ({"key_scale": torch.zeros(2, 40, 4)}, r"key_scale must have shape \[2, 40, 2\], got \[2, 40, 4\]"),
        ({"lengths": torch.tensor([40, 23])}, r"lengths must be integers on the host, got tensor\(\[40, 23\]\)"),
        ({"lengths": [40, 23.5]}, r"lengths must be integers on the host, got \[40, 23.5\]"),
        ({"lengths": [40]}, r"lengths must have one entry a sequence \(2\), got \[40\]"),
        ({"lengths": [41, 23]}, "lengths must be 0 to 40, the tokens a sequence can hold, got 41"),
        ({"lengths": [40, -1]}, "lengths must be 0 to 40, .*, got -1"),
        ({"slice_tokens": 0}, "slice_tokens must be at least 1, got 0"),
    ],
)
def test_rejected_inputs(change, message):
    x = {**make(dtype=torch.float32), "slice_tokens": 16, **change}
    with pytest.raises(ValueError, match=message):
        mla_prefill(**x, scale=SCALE)


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'cuda'"):
        run(make(), backend="cuda")
