"""Every backend of skinny_linear on a GPU, through the public ops, against float64."""

import pytest
import torch

from hylo_ops import skinny_linear, skinny_linear_add_
from hylo_ops.skinny_linear import op
from tests.ops.test_skinny_linear import KINDS, check_within_budget, make, ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
BACKENDS = [backend.name for backend in op._BACKENDS]
FAST = [name for name in BACKENDS if name != "reference"]
# N and K of the products of Llama-4MLA12GDN (K of 2048 and less, and towards 2048), 6MLA22M2 and 14MLA14GDN, and heads.
DIMS = {
    "plain": [
        *((9232, 2048), (1504, 2048), (2048, 1344), (128256, 2048)),
        *((8216, 3072), (13848, 3072), (1728, 3072), (3072, 1536), (128256, 3072)),
    ],
    "swiglu": [(8192, 2048), (8192, 3072)],
    "add": [(2048, 3072), (2048, 2048), (2048, 8192), (3072, 3072), (3072, 4608), (3072, 8192)],
}
MODELS = [(kind, N, K) for kind, dims in DIMS.items() for N, K in dims]
ODD = [("plain", 1, 16), ("plain", 333, 48), ("swiglu", 77, 2064), ("add", 65, 528), ("add", 129, 4112)]


def on_gpu(*rows, **options):
    return make(*rows, device="cuda", **options)


def why_not(kind, x, backend):
    (found,) = (candidate for candidate in op._BACKENDS if candidate.name == backend)
    return found.why_not(x["x"], x["weight"], x.get("residual"), kind == "swiglu", False)


def skip_what_is_refused(kind, x, backend):
    if (reason := why_not(kind, x, backend)) is not None:
        pytest.skip(f"{backend}: {reason}")


def check(kind, x, backend, **options):
    skip_what_is_refused(kind, x, backend)
    return check_within_budget(kind, x, backend=backend, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("kind", "N", "K"), MODELS)
def test_no_product_of_a_model_is_refused(backend, kind, N, K):
    """In any number of rows: nothing falls to the reference."""
    whole = on_gpu(64, N=N, K=K, kind=kind, dtype=BF16)
    for B in range(1, 65):
        few = {name: t if name == "weight" else t[:B] for name, t in whole.items()}
        assert why_not(kind, few, backend) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 2, 16, 17, 64])
@pytest.mark.parametrize(("kind", "N", "K"), MODELS)
def test_products_of_models(backend, B, kind, N, K):
    check(kind, on_gpu(B, N=N, K=K, kind=kind, dtype=BF16), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(backend, kind):
    """Each row's numbers are of its own; all 64 with the same kernel or not."""
    x = on_gpu(64, N=1000, K=1024, kind=kind, dtype=FP16)
    for B in range(1, 65):
        few = {name: t if name == "weight" else t[:B] for name, t in x.items()}
        check(kind, few, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("B", [1, 7, 33])
@pytest.mark.parametrize(("kind", "N", "K"), ODD)
def test_odd_dims(backend, B, dtype, kind, N, K):
    check(kind, on_gpu(B, N=N, K=K, kind=kind, dtype=dtype), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("B", [1, 5, 64])
@pytest.mark.parametrize("K", [1056, 1088])  # of whole tiles and not
@pytest.mark.parametrize("kind", KINDS)
def test_strided_rows_beside_nan(backend, B, K, kind):
    """NaN stands between the rows of all that is read, and in fresh memory."""
    x = on_gpu(B, N=1032, K=K, kind=kind, dtype=BF16)
    views = {}
    for name, tensor in x.items():
        wide = torch.full((len(tensor) + 2, tensor.shape[1] + 64), torch.nan, dtype=BF16, device="cuda")
        views[name] = wide[1:-1, 16 : 16 + tensor.shape[1]].copy_(tensor)
    skip_what_is_refused(kind, views, backend)
    expected = ours(kind, **x, backend=backend)
    torch.full((1 << 24,), torch.nan, device="cuda")  # what the allocator hands out next
    if kind == "add":
        y = skinny_linear_add_(**views, backend=backend)
        assert y._base[:, :16].isnan().all()
        assert y._base[:, 16 + 1032 :].isnan().all()
        assert y._base[[0, -1]].isnan().all()
    else:
        y = ours(kind, **views, backend=backend)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", FAST)
def test_a_row_of_a_longer_sequence(backend):
    """As the head gets it: the last token of each sequence."""
    x = on_gpu(4, 9, N=1000, K=1024, dtype=BF16)
    last = x["x"][:, -1:]
    y = skinny_linear(last, x["weight"], backend=backend)
    assert y.shape == (4, 1, 1000)
    assert torch.equal(y, skinny_linear(last.contiguous(), x["weight"], backend=backend))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("B", [1, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_again(backend, B, kind, constant):
    """Whoever comes last adds the parts in one order, and a launch finds no trace of the one before it."""
    x = on_gpu(B, N=2048, K=8192, kind=kind, dtype=BF16)
    options = {"backend": backend, "constant_weight": constant}
    first = check(kind, x, **options)
    assert all(torch.equal(ours(kind, **x, **options), first) for _ in range(200))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("B", [1, 64])
def test_a_chain_waits_for_what_it_reads(backend, B):
    """Each kernel may begin before the one ahead has ended: MLPs behind each other, with nothing between."""
    layers = [
        (
            on_gpu(B, N=4096, K=1024, kind="swiglu", dtype=BF16)["weight"],
            on_gpu(B, N=1024, K=4096, dtype=BF16)["weight"],
        )
        for _ in range(4)
    ]
    x = on_gpu(B, K=1024, dtype=BF16)["x"]

    def run(constant, between=lambda: None):
        hidden = x.clone()
        for _ in range(5):
            for wide, narrow in layers:
                options = {"constant_weight": constant, "backend": backend}
                inner = skinny_linear(hidden, wide, swiglu=True, **options)
                between()
                hidden = skinny_linear_add_(torch.zeros_like(hidden), inner, narrow, **options)
                between()
        return hidden

    expected = run(False, torch.cuda.synchronize)
    for constant in (False, True):
        assert all(torch.equal(run(constant), expected) for _ in range(20))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("B", [1, 64])
def test_weights_that_the_kernel_ahead_writes(backend, B):
    """`constant_weight=False`: 32 MB that are there when that kernel has ended, and not before."""
    x = on_gpu(B, N=8192, K=2048, dtype=BF16)
    weights = [x["weight"], -x["weight"]]
    expected = [skinny_linear(x["x"], weight, backend=backend) for weight in weights]
    room = torch.empty_like(x["weight"])
    for _ in range(20):
        for weight, want in zip(weights, expected, strict=True):
            room.copy_(weight)
            assert torch.equal(skinny_linear(x["x"], room, backend=backend), want)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("B", [1, 64])
def test_captured_in_graphs(backend, B, constant):
    """Several products in one graph, replayed with other numbers, and beside an eager call on another stream."""
    x = {kind: on_gpu(B, N=2048, K=2048, kind=kind, dtype=BF16) for kind in KINDS}
    options = {"backend": backend, "constant_weight": constant}

    def all_of_them():
        return [ours(kind, **x[kind], **options) for kind in KINDS for _ in range(3)]

    all_of_them()
    torch.cuda.synchronize()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        captured = all_of_them()
    for factor in (-3, 0.5):
        for kind in KINDS:
            x[kind]["x"].mul_(factor)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(other):
            beside = all_of_them()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, beside, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(captured, all_of_them(), strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_waits_for_nothing(backend, kind):
    x = on_gpu(5, N=2048, K=2048, kind=kind, dtype=BF16)
    ours(kind, **x, backend=backend)
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(kind, **x, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


@pytest.mark.parametrize("backend", FAST)
def test_one_launch_and_nothing_else(backend):
    x = on_gpu(5, N=2048, K=8192, dtype=BF16)
    skinny_linear(**x, backend=backend)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        skinny_linear(**x, backend=backend)
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert len(launches) == 1, launches


@pytest.mark.parametrize("backend", FAST)
def test_more_than_2_to_the_31_weights(backend):
    """4.3 GB: the last columns are as those of a small product."""
    free, _ = torch.cuda.mem_get_info()
    if free < 6 << 30:
        pytest.skip("wants 6 GB of GPU memory")
    weight = torch.zeros(1 << 20 | 8, 2048, dtype=BF16, device="cuda")
    assert weight.numel() > 1 << 31
    x = on_gpu(3, N=8, K=2048, dtype=BF16)
    weight[-8:] = x["weight"]
    y = skinny_linear(x["x"], weight, backend=backend)
    torch.testing.assert_close(y[:, -8:], skinny_linear(**x, backend="reference"), rtol=1e-2, atol=1e-2)
    assert not y[:, :-8].any()
