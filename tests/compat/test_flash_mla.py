"""compat.flash_mla: FlashMLA's form and the one on two tensors against a definition; what is refused and copied."""

from functools import partial

import pytest
import torch

from hylo_ops import dequantize_kv_cache, mla_absorb, quantize_kv_cache
from hylo_ops.compat import flash_mla
from hylo_ops.compat.flash_mla import absorbed_attention, flash_mla_with_kvcache, get_mla_metadata
from hylo_ops.testing import cast, gradients, within_budget

DTYPE = torch.float64
R, E = 6, 2
LENGTHS = (0, 1, 2, 9, 37)


def make(T=1, H=3, R=R, E=E, lengths=LENGTHS, page=4, dtype=DTYPE, device="cpu"):
    """Pages in a random order, two to spare; NaN and wrong page numbers wherever nothing may look."""
    rng = torch.Generator().manual_seed(0)
    each = -(-max(lengths) // page)
    order = torch.randperm(len(lengths) * each + 2, generator=rng)[: len(lengths) * each].view(-1, each)
    pool = torch.full((order.numel() + 2, page, R + E), torch.nan, dtype=DTYPE)
    table = torch.full_like(order, 2**31 - 1)
    for n, length in enumerate(lengths):
        for position in range(length):
            table[n, position // page] = order[n, position // page]
            pool[order[n, position // page], position % page] = torch.randn(R + E, generator=rng, dtype=DTYPE)
    return {
        "q": torch.randn(len(lengths), T, H, R + E, generator=rng, dtype=DTYPE).to(device, dtype),
        "k_cache": pool[:, :, None].to(device, dtype),
        "block_table": table.int().to(device),
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "head_dim_v": R,
    }


def run(x, **options):
    schedule, splits = get_mla_metadata()
    return flash_mla_with_kvcache(**x, tile_scheduler_metadata=schedule, num_splits=splits, **options)


def plain(q, k_cache, block_table, cache_seqlens, head_dim_v, scale, causal):
    """One softmax for each new token, over rows that are fetched one by one."""
    batch, T, H, _ = q.shape
    page = k_cache.shape[1]
    out, lse = q.new_zeros(batch, T, H, head_dim_v), q.new_full((batch, H, T), torch.inf)
    for n, length in enumerate(cache_seqlens.tolist()):
        rows = [k_cache[block_table[n, p // page], p % page, 0] for p in range(length)]
        for t in range(T):
            seen = length - (T - 1 - t) if causal else length
            if seen > 0:
                keys = torch.stack(rows[:seen])
                scores = q[n, t] @ keys.mT * scale
                out[n, t] = scores.softmax(-1) @ keys[:, :head_dim_v]
                lse[n, :, t] = scores.logsumexp(-1)
    return out, lse


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# FlashMLA's form


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("page", [1, 4, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_definition(T, page, causal):
    x = make(T, page=page)
    close(run(x, softmax_scale=0.4, causal=causal), plain(**x, scale=0.4, causal=causal))


def test_a_cache_without_rope():
    x = make(2, E=0)
    close(run(x, softmax_scale=0.4, causal=True), plain(**x, scale=0.4, causal=True))


def test_what_is_left_out():
    """The scale is that of q's width, and new tokens see each other."""
    x = make(3)
    close(run(x), plain(**x, scale=(R + E) ** -0.5, causal=False))
    assert not torch.equal(run(x)[0], run(x, causal=True)[0])


def test_the_last_token_sees_everything():
    """And the one before it everything but the last position, as if it were the last of a shorter sequence."""
    x = make(3)
    out, lse = run(x, causal=True)
    everything = run(x)
    close((out[:, 2], lse[..., 2]), (everything[0][:, 2], everything[1][..., 2]))
    shorter = {**x, "q": x["q"][:, 1:2], "cache_seqlens": (x["cache_seqlens"] - 1).clamp(min=0)}
    close((out[:, 1:2], lse[..., 1:2]), run(shorter))


def test_tokens_that_see_nothing():
    """Zeros and an lse of +inf: a sequence of length 0, and tokens before the first of theirs; nothing else."""
    out, lse = run(make(3), causal=True)
    blind = torch.tensor([[True] * 3, [True, True, False], [True, False, False], [False] * 3, [False] * 3])
    assert torch.equal(lse == torch.inf, blind[:, None].expand(5, 3, 3))
    assert torch.isfinite(lse.transpose(1, 2)[~blind]).all()
    assert torch.equal(out == 0, blind[..., None, None].expand(5, 3, 3, R))


def test_shapes_and_dtypes():
    x = make(2, H=5, dtype=torch.bfloat16)
    out, lse = run(x)
    assert (out.shape, out.dtype) == ((5, 2, 5, R), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((5, 5, 2), torch.float32)


def test_a_wrong_score_stays_one():
    x = make()
    x["q"][3] = torch.nan
    _, lse = run(x)
    assert torch.equal(lse.isnan(), (torch.arange(5) == 3)[:, None, None].expand(5, 3, 1))


def test_metadata_plans_nothing():
    x = make(2)
    expected = run(x)
    earlier = get_mla_metadata(x["cache_seqlens"], 2 * 3, 1)
    close(flash_mla_with_kvcache(*x.values(), *earlier), expected)
    named = get_mla_metadata(
        cache_seqlens=x["cache_seqlens"], num_q_tokens_per_head_k=6, num_heads_k=1, num_heads_q=3, is_fp8_kvcache=True
    )
    close(flash_mla_with_kvcache(*x.values(), *named), expected)
    schedule, splits = get_mla_metadata()
    assert isinstance(schedule, flash_mla.FlashMLASchedMeta)
    assert splits is None
    for lengths in ((37,) * 5, LENGTHS):  # one schedule for calls with other lengths
        y = make(2, lengths=lengths)
        close(flash_mla_with_kvcache(*y.values(), schedule), plain(**y, scale=(R + E) ** -0.5, causal=False))


def test_positions_of_the_arguments():
    x = make(2)
    found = flash_mla_with_kvcache(*x.values(), *get_mla_metadata(), 0.3, True, False, None)
    close(found, plain(**x, scale=0.3, causal=True))


@pytest.fixture
def seen(monkeypatch):
    """What the op gets, call by call."""
    calls = []

    def recorded(*tensors, **options):
        calls.append(tensors)
        return mla_absorb(*tensors, **options)

    monkeypatch.setattr(flash_mla, "mla_absorb", recorded)
    return calls


def test_nothing_is_copied(seen):
    x = make(2)
    strided = torch.zeros(5, 2, 3, 2 * (R + E), dtype=DTYPE)[..., : R + E].copy_(x["q"])
    close(run({**x, "q": strided}), run(x))
    ((q_nope, q_rope, cache), _) = seen
    assert q_nope.data_ptr() == strided.data_ptr()
    assert q_rope.data_ptr() == strided[..., R:].data_ptr()
    assert cache.data_ptr() == x["k_cache"].data_ptr()
    assert cache.shape == (x["k_cache"].shape[0], 4, R + E)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("indices", torch.zeros(5, 1, 4, dtype=torch.int32)),
        ("attn_sink", torch.zeros(3)),
        ("extra_k_cache", torch.zeros(2, 4, 1, R + E)),
        ("extra_indices_in_kvcache", torch.zeros(5, 1, 4, dtype=torch.int32)),
        ("topk_length", torch.zeros(5, dtype=torch.int32)),
        ("extra_topk_length", torch.zeros(5, dtype=torch.int32)),
    ],
)
def test_what_there_is_not(name, value):
    got = ", ".join(map(str, value.shape))
    with pytest.raises(NotImplementedError, match=rf"^{name} is not supported: .*; got \[{got}\]$"):
        run(make(), **{name: value})


def test_metadata_for_what_there_is_not():
    with pytest.raises(NotImplementedError, match=r"topk is not supported: .*; got 2048"):
        get_mla_metadata(topk=2048)
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_k'"):
        get_mla_metadata(top_k=None)


def test_what_it_refuses():
    x = make()
    cache = x["k_cache"]
    for changed, message in (
        ({"q": x["q"][:, 0]}, r"q must have shape \[batch, seq_len_q, heads_q, head_dim\], got \[5, 3, 8\]"),
        ({"head_dim_v": 0}, r"head_dim_v must be 1 to head_dim \(8\), got 0"),
        ({"head_dim_v": 9}, r"head_dim_v must be 1 to head_dim \(8\), got 9"),
        ({"k_cache": cache[:, :, 0]}, r"k_cache must have shape .*, 1, 8\], got \[52, 4, 8\]"),
        ({"k_cache": cache.expand(-1, -1, 2, -1)}, r"k_cache must have shape .*, 1, 8\], got \[52, 4, 2, 8\]"),
        ({"k_cache": cache[..., :7]}, r"k_cache must have shape .*, 1, 8\], got \[52, 4, 1, 7\]"),
        ({"k_cache": cache.to(torch.float8_e4m3fn)}, "k_cache must be float64, got float8_e4m3fn"),
        ({"block_table": None}, "block_table must be a tensor, got None"),
        ({"cache_seqlens": None}, "cache_seqlens must be a tensor, got None"),
        ({"block_table": x["block_table"][:2]}, r"block_table must have shape \[5, max pages\], got \[2, 10\]"),
        ({"cache_seqlens": x["cache_seqlens"][:2]}, r"cache_seqlens must have shape \[5\], got \[2\]"),
        ({"cache_seqlens": x["cache_seqlens"].float()}, "cache_seqlens must be int32 or int64, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**x, **changed})
    with pytest.raises(TypeError, match="unexpected keyword argument 'descale_k'"):
        run(x, descale_k=None)


# A cache in fp8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_flash_mla_s_rows_of_656_bytes(dtype, seen):
    """Put together from bytes as its README has it; read where they lie, in pages with a row to spare."""
    x = make(2, R=512, E=64, page=64, dtype=torch.float32) | {"head_dim_v": 512}
    x["q"] = x["q"].bfloat16()
    latents, rope = x["k_cache"].split([512, 64], -1)
    scale = latents.unflatten(-1, (4, 128)).abs().amax(-1) / 448
    codes = (latents.unflatten(-1, (4, 128)) / scale[..., None]).to(torch.float8_e4m3fn)
    parts = [codes.flatten(-2), scale, rope.bfloat16()]
    rows = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    pool = torch.full((len(rows), 65, 1, 656), 255, dtype=torch.uint8)[:, :64]
    found = run(x | {"k_cache": pool.copy_(rows).view(dtype)}, causal=True, is_fp8_kvcache=True)
    ((_, _, cache),) = seen
    assert cache.data_ptr() == pool.data_ptr()
    products = (codes.double() * scale[..., None]).flatten(-2)
    exact = cast(x, DTYPE) | {"k_cache": torch.cat([products, rope.bfloat16().double()], -1)}
    out, lse = plain(**exact, scale=576**-0.5, causal=True)
    within_budget(found[0], out.bfloat16(), out, "out")
    torch.testing.assert_close(found[1], lse.float())


def test_rows_in_fp8_of_other_dims():
    x = make(1, R=128, E=32, dtype=torch.bfloat16) | {"head_dim_v": 128}
    rows = quantize_kv_cache(x["k_cache"], latent_rank=128)
    found = run(x | {"k_cache": rows}, is_fp8_kvcache=True)
    back = dequantize_kv_cache(rows, latent_rank=128, width=160, dtype=torch.bfloat16, out_dtype=DTYPE)
    out, lse = plain(**cast(x, DTYPE) | {"k_cache": back}, scale=160**-0.5, causal=False)
    within_budget(found[0], out.bfloat16(), out, "out")
    torch.testing.assert_close(found[1], lse.float())


def test_what_it_refuses_of_fp8():
    x = make(R=128, E=32, dtype=torch.bfloat16) | {"head_dim_v": 128}
    rows = quantize_kv_cache(x["k_cache"], latent_rank=128)
    for changed, message in (
        ({"k_cache": x["k_cache"]}, r"k_cache must have shape .*, 1, 208\], got \[52, 4, 1, 160\]"),
        ({"k_cache": rows.short()}, "k_cache must be uint8 or float8_e4m3fn, got int16"),
        ({"k_cache": rows, "head_dim_v": 160}, r"k_cache must have shape .*, 1, 176\], got \[52, 4, 1, 208\]"),
        ({"k_cache": rows, "q": x["q"].float()}, "fp8 kv_cache must be bfloat16 or float16, got float32"),
    ):
        with pytest.raises(ValueError, match=message):
            run({**x, **changed}, is_fp8_kvcache=True)


# Latents and rope keys as two tensors


def make_two(T=2, H=3, B=2, S=9, dtype=DTYPE):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=DTYPE).to(dtype)

    return {"q_nope": normal(B, T, H, R), "q_pe": normal(B, T, H, E), "kv": normal(B, S, R), "k_pe": normal(B, S, E)}


def plain_two(q_nope, q_pe, kv, k_pe, cache_seqlens=None, causal=True):
    (B, T, _, _), S = q_nope.shape, kv.shape[1]
    lengths = torch.full((B,), S) if cache_seqlens is None else cache_seqlens
    scores = torch.einsum("bthr,bsr->bths", q_nope, kv) + torch.einsum("bthe,bse->bths", q_pe, k_pe)
    limit = lengths[:, None] - (torch.arange(T).flip(0) if causal else 0)
    scores = (0.4 * scores).masked_fill((torch.arange(S) >= limit[..., None])[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("bths,bsr->bthr", (scores - lse[..., None]).exp().nan_to_num(0.0), kv), lse


def run_two(**options):
    return absorbed_attention(**options, softmax_scale=0.4, return_lse=True)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("lengths", [None, (9, 9), (4, 2), (0, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_two_tensors_equal_the_definition(T, lengths, causal):
    x = make_two(T)
    options = {"cache_seqlens": None if lengths is None else torch.tensor(lengths, dtype=torch.int32), "causal": causal}
    found = run_two(**x, **options)
    close(found, plain_two(**x, **options))
    assert torch.equal(absorbed_attention(**x, softmax_scale=0.4, **options), found[0])


@pytest.mark.parametrize("lengths", [None, (9, 4)])
def test_gradients_of_slices_and_of_two_tensors(lengths):
    x = make_two()
    lengths = None if lengths is None else torch.tensor(lengths)
    expected = gradients(partial(plain_two, cache_seqlens=lengths), x, tuple(x))
    found = gradients(partial(run_two, cache_seqlens=lengths), x, tuple(x))
    assert found.keys() == x.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-10, msg=name)

    def of_slices(q_nope, q_pe, cache):
        return run_two(q_nope=q_nope, q_pe=q_pe, kv=cache[..., :R], k_pe=cache[..., R:], cache_seqlens=lengths)

    cache = torch.cat([x["kv"], x["k_pe"]], -1)
    found = gradients(of_slices, {"q_nope": x["q_nope"], "q_pe": x["q_pe"], "cache": cache}, ("cache",))
    wanted = torch.cat([expected["kv"], expected["k_pe"]], -1)
    torch.testing.assert_close(found["cache"], wanted, rtol=0, atol=1e-10)


def test_slices_of_one_cache_are_not_copied(seen):
    x = make_two()
    cache = torch.full((2, 12, R + E + 3), torch.nan, dtype=DTYPE)
    kv, k_pe = cache[:, 1:10, 1 : R + 1], cache[:, 1:10, R + 1 : R + E + 1]
    kv.copy_(x["kv"])
    k_pe.copy_(x["k_pe"])
    close(run_two(**{**x, "kv": kv, "k_pe": k_pe}), plain_two(**x))
    ((_, _, rows),) = seen
    assert rows.data_ptr() == kv.data_ptr()
    assert (rows.shape, rows.stride()) == ((2, 9, R + E), cache.stride())


def placed(x, first, second, gap=0, step=1, apart=0):
    """kv and k_pe in one tensor: which comes first, room between them, every how many columns, rows apart."""
    width = R + E + gap
    whole = torch.full((2, 9 + apart, width * step), torch.nan, dtype=DTYPE)
    columns = whole[..., ::step]
    begin = {first: 0, second: x[first].shape[2] + gap}
    for name in (first, second):
        rows = slice(apart, 9 + apart) if name == "k_pe" else slice(0, 9)
        view = columns[:, rows, begin[name] : begin[name] + x[name].shape[2]]
        view.copy_(x[name])
        x[name] = view
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"first": "k_pe", "second": "kv"},
        {"first": "kv", "second": "k_pe", "gap": 1},
        {"first": "kv", "second": "k_pe", "step": 2},
        {"first": "kv", "second": "k_pe", "apart": 1},
    ],
    ids=["rope first", "a gap", "every second column", "rows apart"],
)
def test_what_is_not_side_by_side_is_copied(options, seen):
    x = make_two()
    expected = plain_two(**x)
    close(run_two(**placed(x, **options)), expected)
    assert seen[0][2].is_contiguous()


def test_two_tensors_without_rope():
    x = make_two()
    x |= {"q_pe": x["q_pe"][..., :0], "k_pe": x["k_pe"][..., :0]}
    close(run_two(**x), plain_two(**x))
    at_the_end = torch.zeros(9, dtype=DTYPE)[9:].view(2, 9, 0)
    close(run_two(**{**x, "k_pe": at_the_end}), plain_two(**x))


def test_what_the_form_on_two_tensors_refuses():
    x = make_two()
    for changed, message in (
        ({"q_nope": x["q_nope"][0]}, r"q_nope must have shape \[batch, tokens, heads, R\], got \[2, 3, 6\]"),
        ({"q_pe": x["q_pe"][:, :1]}, r"q_pe must have shape \[2, 2, 3, E\], got \[2, 1, 3, 2\]"),
        ({"kv": x["kv"][..., :5]}, r"kv must have shape \[2, length, 6\], got \[2, 9, 5\]"),
        ({"k_pe": x["k_pe"][:, :8]}, r"k_pe must have shape \[2, 9, 2\], got \[2, 8, 2\]"),
        ({"k_pe": x["k_pe"].float()}, "k_pe must be float64, got float32"),
        ({"q_pe": x["q_pe"].float()}, "q_pe must be float64, got float32"),
        ({"cache_seqlens": torch.tensor([1, 2, 3])}, r"cache_seqlens must have shape \[2\], got \[3\]"),
        ({"cache_seqlens": torch.tensor([9, 10])}, "cache_seqlens must be at most 9, .* got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            run_two(**{**x, **changed})
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        absorbed_attention(**x, scale=0.4)


def test_both_compile_whole():
    x, y = make(2), make_two()
    schedule, _ = get_mla_metadata()
    compiled = torch.compile(flash_mla_with_kvcache, fullgraph=True, backend="aot_eager")
    close(compiled(**x, tile_scheduler_metadata=schedule, causal=True), run(x, causal=True))
    compiled = torch.compile(absorbed_attention, fullgraph=True, backend="aot_eager")
    cache = torch.cat([y["kv"], y["k_pe"]], -1)
    found = compiled(y["q_nope"], y["q_pe"], cache[..., :R], cache[..., R:], softmax_scale=0.4, return_lse=True)
    close(found, plain_two(**y))


# On a GPU


@pytest.fixture
def on_cuda(monkeypatch):
    """The backend by name: it runs or says why it cannot."""
    monkeypatch.setattr(flash_mla, "mla_absorb", partial(mla_absorb, backend="cuda"))


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs an NVIDIA GPU of compute capability 9.0",
    ),
]


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize(("R", "E"), [(512, 64), (128, 32)])
@pytest.mark.parametrize("causal", [pytest.param(False, marks=gpu), pytest.param(True, marks=gpu)])
def test_the_cuda_backend_agrees_with_float64(R, E, T, causal, on_cuda):
    x = make(T, H=16, R=R, E=E, lengths=(0, 1, 2, 64, 300), page=64, dtype=torch.bfloat16, device="cuda")
    out, lse = run(x, softmax_scale=0.1, causal=causal)
    eager, _ = plain(**x, scale=0.1, causal=causal)
    exact, exact_lse = plain(**cast(x, DTYPE), scale=0.1, causal=causal)
    within_budget(out, eager, exact, "out")
    blind = exact_lse == torch.inf
    assert torch.equal(lse == torch.inf, blind)
    assert not out.transpose(1, 2)[blind].any()
    torch.testing.assert_close(lse[~blind].double(), exact_lse[~blind], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("R", "E"), [pytest.param(512, 64, marks=gpu), pytest.param(128, 32, marks=gpu)], ids=["512+64", "128+32"]
)
def test_the_cuda_backend_takes_two_tensors_and_slices(R, E, on_cuda):
    rng = torch.Generator().manual_seed(0)
    q, cache = (torch.randn(*shape, generator=rng).bfloat16().cuda() for shape in ((2, 2, 16, R + E), (2, 300, R + E)))
    options = {"softmax_scale": 0.1, "cache_seqlens": torch.tensor([300, 7], device="cuda"), "return_lse": True}
    queries, keys = q.split([R, E], -1), cache.split([R, E], -1)
    found = absorbed_attention(*queries, *keys, **options)
    for one, other in zip(found, absorbed_attention(*queries, *(k.clone() for k in keys), **options), strict=True):
        assert torch.equal(one, other)
    table = torch.arange(2, device="cuda")[:, None]
    x = {"q": q, "k_cache": cache[:, :, None], "block_table": table, "cache_seqlens": options["cache_seqlens"]}
    eager, _ = plain(**x, head_dim_v=R, scale=0.1, causal=True)
    exact, _ = plain(**cast(x, DTYPE), head_dim_v=R, scale=0.1, causal=True)
    within_budget(found[0], eager, exact, "o")
