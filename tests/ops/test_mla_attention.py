"""mla_attention: definition, grouped heads, two widths, gradients, autocast, what is chosen, rejected inputs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from hylo_ops import mla_attention
from hylo_ops.mla_attention import op
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.layouts import shifted

DTYPE = torch.float64
SCALE = 0.4
NAMES = ("q", "k", "v")
FUSED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # an order of a user's
BACKENDS = [None, "reference"]
DIMS = [(4, 2, 8, 8), (4, 4, 12, 8), (6, 1, 8, 16)]  # H, HK, K, V


def make(B=2, T=13, H=4, HK=2, K=8, V=8, dtype=DTYPE):
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (B, T, H, K), "k": (B, T, HK, K), "v": (B, T, HK, V)}
    return {name: torch.randn(*shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


def run(q, k, v, backend=None):
    return mla_attention(q, k, v, scale=SCALE, backend=backend)


def plain(q, k, v):
    """One query after the other in the inputs' dtype, with nothing of ours in it."""
    B, T, H, _ = q.shape
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h * k.shape[2] // H
                rows.append((SCALE * k[b, : t + 1, g] @ q[b, t, h]).softmax(0) @ v[b, : t + 1, g])
    return torch.stack(rows).view(B, T, H, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("T", [1, 2, 13])
def test_equals_the_definition(backend, dims, T):
    x = make(T=T, **dict(zip(("H", "HK", "K", "V"), dims, strict=True)))
    o = run(**x, backend=backend)
    assert o.is_contiguous()
    torch.testing.assert_close(o, plain(**x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", DIMS)
def test_gradients(backend, dims):
    x = make(T=7, **dict(zip(("H", "HK", "K", "V"), dims, strict=True)))
    got = gradients(lambda **kw: run(**kw, backend=backend), x, NAMES)
    expected = gradients(plain, x, NAMES)
    for name in NAMES:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("V", [8, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_budget(backend, V, dtype):
    x = cast(make(V=V, T=40), dtype)
    o = run(**x, backend=backend)
    assert o.dtype == dtype
    within_budget(o, plain(**x), plain(**cast(x, DTYPE)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [{"B": 0}, {"T": 0}])
def test_nothing_to_do(backend, change):
    x = make(**change)
    assert run(**x, backend=backend).shape == x["q"].shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    """All side by side in one projection, and odd addresses."""
    joined = torch.randn(2, 13, 4, 24, dtype=DTYPE)
    q, k, v = joined[..., :8], joined[:, :, ::2, 8:16], joined[:, :, 1::2, 16:]
    expected = run(q.contiguous(), k.contiguous(), v.contiguous(), backend)
    torch.testing.assert_close(run(q, k, v, backend), expected, rtol=0, atol=1e-12)
    odd = {name: shifted(t.float()) for name, t in make().items()}
    for name, t in make().items():
        odd[name].copy_(t)
    torch.testing.assert_close(run(**odd, backend=backend), run(**cast(odd, DTYPE)).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_token_reaches_no_earlier_one(backend):
    x = make()
    changed = {name: torch.cat([t[:, :9], 1e3 * t[:, 9:]], dim=1) for name, t in x.items()}
    o, expected = run(**changed, backend=backend), run(**x, backend=backend)
    torch.testing.assert_close(o[:, :9], expected[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(o[:, 9:], expected[:, 9:])


def test_autocast_casts_what_it_gets():
    """Dtypes that a projection and a rotation leave there; as PyTorch's own attention does."""
    x = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        o = run(x["q"], x["k"].bfloat16(), x["v"])
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, run(**cast(x, torch.bfloat16)))


@pytest.mark.parametrize("dims", [(4, 2, 8, 8), (4, 2, 12, 8)])
def test_compiles_without_a_graph_break(dims):
    x = make(**dict(zip(("H", "HK", "K", "V"), dims, strict=True)), dtype=torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), run(**x))
    got, expected = gradients(compiled, x, NAMES), gradients(run, x, NAMES)
    torch.testing.assert_close(got, expected)


# What CUDA tensors go through; the CPU has one fused attention, for equal widths, under flash's name.


def test_only_what_is_named_may_run(monkeypatch):
    """And what the user allowed and preferred before is so again, and meanwhile."""
    seen = []
    monkeypatch.setattr(op, "_attend", lambda q, *_: seen.append(_cur_sdpa_kernel_backends(with_priority=True)) or q)
    x = make()
    with sdpa_kernel([SDPBackend.MATH, *FUSED], set_priority=True):
        op._fused(*x.values(), SCALE, list(op.FUSED))
        op._fused(*x.values(), SCALE, ["flash"])
        assert _cur_sdpa_kernel_backends(with_priority=True) == [SDPBackend.MATH, *FUSED]
    assert seen == [FUSED, [SDPBackend.FLASH_ATTENTION]]


@pytest.mark.filterwarnings("ignore:Flash attention")  # PyTorch's reasons
def test_nothing_falls_to_the_composed_attention():
    x = make(K=12)
    with pytest.raises(NotImplementedError, match=r"13 tokens, keys of 12 and values of 8 in .* on cudnn, flash, eff"):
        op._fused(*x.values(), SCALE, list(op.FUSED))
    with pytest.raises(NotImplementedError, match="on efficient"):
        op._fused(*make().values(), SCALE, ["efficient"])
    torch.testing.assert_close(op._fused(*make().values(), SCALE, list(op.FUSED)), run(**make()))


def test_another_failure_keeps_its_message(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(op, "_attend", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        op._fused(*make().values(), SCALE, ["flash"])


@pytest.mark.parametrize(
    ("change", "names", "heads"),
    [
        ({"dtype": torch.bfloat16}, None, 2),
        ({"dtype": torch.bfloat16, "K": 12}, None, 2),
        ({"dtype": torch.bfloat16, "T": 1}, None, 2),
        ({"dtype": torch.bfloat16, "T": 1, "K": 12}, None, 4),
        ({"dtype": torch.float32}, None, 4),
        ({"dtype": torch.bfloat16}, ["efficient"], 4),
    ],
)
def test_keys_are_repeated_only_for_the_efficient_attention(monkeypatch, change, names, heads):
    seen = []
    monkeypatch.setattr(op, "_attend", lambda q, k, v, _: seen.append((k, v)) or q)
    x = make(**change)
    op._fused(*x.values(), SCALE, names or list(op.FUSED))
    for name, found in zip(("k", "v"), seen[0], strict=True):
        assert torch.equal(found, x[name] if heads == 2 else x[name].repeat_interleave(2, dim=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 6)}, r"q must have shape \[B, T, H, K\], got \[2, 4, 6\]"),
        ({"q": torch.zeros(2, 13, 4, 8, dtype=torch.int32)}, "q must be bfloat16 or .*, got int32"),
        ({"k": torch.zeros(2, 12, 2, 8)}, r"k must have shape \[2, 13, HK, 8\], got \[2, 12, 2, 8\]"),
        ({"k": torch.zeros(2, 13, 2, 8, dtype=DTYPE)}, "k must be float32, got float64"),
        ({"v": torch.zeros(2, 13, 4, 8)}, r"v must have shape \[2, 13, 2, V\], got \[2, 13, 4, 8\]"),
        ({"v": torch.zeros(2, 13, 2, 8, dtype=torch.int8)}, "v must be float32, got int8"),
        (
            {"k": torch.zeros(2, 13, 3, 8), "v": torch.zeros(2, 13, 3, 8)},
            "the heads of q must be a multiple of the heads of k, got .* 4 and .* 3",
        ),
        ({"k": torch.zeros(2, 13, 2, 8, device="meta")}, "k must be on the device of q"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        run(**{**make(dtype=torch.float32), **change})


def test_a_named_backend_runs_or_says_why_not():
    with pytest.raises(NotImplementedError, match=r"no backend 'math'; it has \['cudnn', 'flash', 'efficient', 'ref"):
        run(**make(), backend="math")
    with pytest.raises(NotImplementedError, match="cannot run on flash: q is on cpu, not on a CUDA device"):
        run(**make(), backend="flash")
