"""The fast backends of ssd on a GPU, against float64."""

import itertools
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from hylo_ops import causal_conv1d, chunk_ssd, recurrent_ssd
from hylo_ops.fused.convolved_ssd import convolved_ssd, split
from hylo_ops.ssd import cuda, cuda_chunk, triton
from hylo_ops.testing import cast, gradients, relative_error
from tests.ops import ssd_plain_cases
from tests.ops.ssd_cases import GATES, HEADS, WIDTHS, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BACKENDS = ["cuda", "triton"]
NAMES = ("x", "dt", "a", "b", "c", "d", "dt_bias", "initial_state")
TOKENWISE = ("x", "dt", "b", "c")
VECTORS = ("a", "d", "dt_bias")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
by_backend = pytest.mark.parametrize("backend", BACKENDS)
on_both_kernels = pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])  # tensor cores, CUDA cores


@contextmanager
def where_it_runs(backend):
    """Skips rows that the CUDA backend cannot read 16 bytes at a time; else both run all of the contract."""
    try:
        yield
    except NotImplementedError as reason:
        if backend == "triton" or "aligned" not in str(reason):
            raise
        pytest.skip(str(reason))


def call(inputs, backend, **options):
    with where_it_runs(backend):
        return chunk_ssd(**inputs, **{"dt_softplus": True} | options, backend=backend)


def near(found, exact, dtype, name, units=3):
    """Products of 16-bit operands: all errs like a few roundings to 16 bits, and float32 like float32."""
    limit = 5e-6 if dtype == FP32 else units * relative_error(exact.to(dtype), exact)
    assert relative_error(found, exact) <= limit, f"{name}: {relative_error(found, exact):.2e}, limit {limit:.2e}"


def check(inputs, backend, **options):
    o, state = call(inputs, backend, **options)
    o_exact, state_exact = call(cast(inputs, torch.float64), "reference", **options)
    near(o, o_exact, inputs["x"].dtype, "o")
    near(state, state_exact, inputs["x"].dtype, "final_state")
    return o, state


def same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@by_backend
@by_dtype
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("V", "K"), [*WIDTHS, (48, 80), (144, 112)])
def test_forward(backend, dtype, gates, V, K):
    inputs = make(2, 333, "hylo", V, K, dtype, gates, device="cuda")
    same(check(inputs, backend), call(inputs, backend))


@by_backend
@on_both_kernels
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("V", [64, 128])
def test_heads(backend, dtype, kind, V):
    check(make(1, 1000, kind, V, 128, dtype, device="cuda"), backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 127, 128, 129, 257])
def test_lengths(backend, dtype, T):
    check(make(2, T, "equal", 64, 64, dtype, device="cuda"), backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize(("softplus", "limit"), [(True, (0.01, 0.1)), (False, None), (False, (0.0, float("inf")))])
def test_steps(backend, dtype, softplus, limit):
    inputs = make(2, 200, "hylo", 64, 64, dtype, device="cuda")
    if not softplus:
        inputs |= {"dt": inputs["dt"].abs() / 30, "dt_bias": inputs["dt_bias"].abs() / 100}
    check(inputs, backend, dt_softplus=softplus, dt_limit=limit)
    check_gradients(inputs, backend, dt_softplus=softplus, dt_limit=limit)


@by_backend
@on_both_kernels
def test_options_left_out(backend, dtype):
    inputs = make(2, 200, "mamba2", 64, 128, dtype, device="cuda")
    bare = inputs | dict.fromkeys(("d", "dt_bias", "initial_state"))
    bare["dt"] = bare["dt"] - 4
    check(bare, backend)
    check_gradients(bare, backend)


@by_backend
@by_dtype
def test_decays_of_exp_minus_400_a_chunk(backend, dtype):
    inputs = make(2, 512, "hylo", 64, 64, dtype, device="cuda")
    inputs["a"][:] = -torch.linspace(100, 1600, 8)
    inputs["dt"].fill_(1 / 256)
    inputs["dt_bias"].zero_()
    check(inputs, backend, dt_softplus=False)
    check_gradients(inputs, backend, dt_softplus=False)


@by_backend
@pytest.mark.parametrize("gates", ["fast", "slow"])
@on_both_kernels
@pytest.mark.parametrize(("kind", "V", "K"), [("hylo", 64, 64), ("mamba2", 64, 128), ("hylo", 128, 128)])
def test_long_sequences(backend, dtype, gates, kind, V, K):
    inputs = make(1, 8192, kind, V, K, dtype, gates, device="cuda")
    check(inputs, backend)
    check_gradients(inputs, backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize(("kind", "V", "K"), [("hylo", 64, 64), ("mamba2", 64, 128), ("hylo", 128, 128)])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(backend, dtype, kind, V, K):
    """The neighbour's NaN reaches nobody else's results or gradients, and a sequence has those that it has alone."""
    bounds = [0, 70, 70, 71, 300, 900, 900]
    inputs = make(1, 900, kind, V, K, dtype, "fast", len(bounds) - 1, device="cuda")
    inputs["x"][:, 71:300] = torch.nan
    inputs["b"][:, 71:300] = torch.nan
    cu = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    results, found = run_both_ways(inputs, backend, cu_seqlens=cu, fixed_split=True)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = inputs | {name: inputs[name][:, begin:end] for name in TOKENWISE}
        alone["initial_state"] = inputs["initial_state"][n : n + 1]
        results_n, expected = run_both_ways(alone, backend, fixed_split=True)
        assert torch.equal(results[0][:, begin:end].nan_to_num(7), results_n[0].nan_to_num(7))
        assert torch.equal(results[1][n : n + 1].nan_to_num(7), results_n[1].nan_to_num(7))
        if n == 3:
            continue
        for name in (*TOKENWISE, "initial_state"):
            part = found[name][n : n + 1] if name == "initial_state" else found[name][:, begin:end]
            assert torch.isfinite(part).all(), (n, name)
            assert torch.equal(part, expected[name]), (n, name)


def run_both_ways(inputs, backend, **options):
    """Results, and gradients of their sum."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    results = call(leaves, backend, **options)
    with where_it_runs(backend):
        grads = torch.autograd.grad(results, list(leaves.values()), [torch.ones_like(result) for result in results])
    return [result.detach() for result in results], dict(zip(leaves, grads, strict=True))


@by_backend
@on_both_kernels
def test_batch_invariant_with_fixed_split(backend, dtype):
    inputs = make(3, 2048, "hylo", 64, 64, dtype, device="cuda")
    results, found = run_both_ways(inputs, backend, fixed_split=True)
    one = inputs | {name: inputs[name][1:2] for name in (*TOKENWISE, "initial_state")}
    results_one, expected = run_both_ways(one, backend, fixed_split=True)
    same([result[1:2] for result in results], results_one)
    for name in (*TOKENWISE, "initial_state"):
        assert torch.equal(found[name][1:2], expected[name]), name


@by_backend
@on_both_kernels
@pytest.mark.parametrize("padding", [0, 1], ids=["aligned", "odd"])
def test_slices_of_one_projection(backend, dtype, padding):
    inputs = make(2, 200, "hylo", 64, 64, dtype, device="cuda")
    joined = torch.cat([inputs[name].flatten(2) for name in ("x", "b", "c", "dt")], dim=-1)
    joined = torch.nn.functional.pad(joined, (padding, 0))[..., padding:]
    x, b, c, dt = joined.split([128, 128, 512, 8], -1)
    views = {name: t.unflatten(-1, (-1, 64)) for name, t in (("x", x), ("b", b), ("c", c))} | {"dt": dt}
    assert not any(view.is_contiguous() for view in views.values())
    found, expected = run_both_ways(inputs | views, backend), run_both_ways(inputs, backend)
    same(found[0], expected[0])
    same(found[1].values(), expected[1].values())


def check_gradients(inputs, backend, units=5, **options):
    options = {"dt_softplus": True} | options
    wanted = [name for name in NAMES if inputs[name] is not None]
    exact = gradients(chunk_ssd, cast(inputs, torch.float64) | {"backend": "reference"} | options, wanted, BF16)
    with where_it_runs(backend):
        found = gradients(chunk_ssd, inputs | {"backend": backend} | options, wanted, BF16)
        again = gradients(chunk_ssd, inputs | {"backend": backend} | options, wanted, BF16)
    dtype = inputs["x"].dtype
    for name, gradient in found.items():
        assert gradient.dtype == inputs[name].dtype
        assert torch.equal(gradient, again[name]), name
        # Few numbers, in each of which much cancels: 27 roundings of `a` at 8192 tokens whose gates are slow, if it is
        # made of states in 16 bits, as on `cuda` it is not.
        factor = 8 if name in VECTORS else 1
        if name == "a" and backend == "cuda" and dtype != FP32:
            factor = 0.1
        limit = 1e-5 if dtype == FP32 else units * relative_error(exact[name].to(dtype), exact[name])
        error = relative_error(gradient, exact[name])
        assert error <= factor * limit, f"{name}: {error:.2e}, limit {factor * limit:.2e}"


@by_backend
@by_dtype
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("V", "K"), [*WIDTHS, (48, 80), (144, 112)])
def test_gradients(backend, dtype, gates, V, K):
    check_gradients(make(1, 333, "hylo", V, K, dtype, gates, device="cuda"), backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("V", "K"), [(64, 128), (128, 128), (64, 256), (192, 64)])
def test_gradients_of_shared_heads(backend, dtype, kind, V, K):
    check_gradients(make(2, 333, kind, V, K, dtype, device="cuda"), backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize("T", [1, 64, 65, 129])
def test_gradients_of_short_sequences(backend, dtype, T):
    check_gradients(make(1, T, "equal", 64, 64, dtype, device="cuda"), backend)


@by_backend
@on_both_kernels
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_of_x_b_and_c_in_one_tensor(backend, dtype, packed, kind):
    """Of three views of a convolution's output and of the convolution: the same bits, also at sequences' ends within a
    chunk."""
    inputs = make(1, 300, kind, 64, 128, dtype, states=3 if packed else 1, device="cuda")
    bounds = torch.tensor([0, 70, 128, 300], dtype=torch.int32, device="cuda") if packed else None
    x, b, c = (inputs.pop(name) for name in ("x", "b", "c"))
    inputs["xbc"] = torch.cat([t.flatten(2) for t in (x, b, c)], -1)
    generator = torch.Generator(device="cuda").manual_seed(1)
    inputs["weight"] = torch.randn(inputs["xbc"].shape[2], 4, generator=generator, device="cuda")
    dims = 64, 128, x.shape[2], b.shape[2]
    options = {"dt_softplus": True, "dt_limit": None, "cu_seqlens": bounds}

    def of_views(xbc, weight, **others):
        mixed, _ = causal_conv1d(xbc, weight, activation="silu", cu_seqlens=bounds)
        x, b, c = split(mixed, dims)
        return chunk_ssd(x=x, b=b, c=c, **others, backend=backend)

    def of_one(xbc, weight, dt, a, **others):
        name = "composed" if backend == "cuda" else backend
        return convolved_ssd(xbc, weight, None, dt, a, dims, **others, conv_state=None, backend=name)[:2]

    found = gradients(partial(of_one, **options), inputs, list(inputs))
    same(found.values(), gradients(partial(of_views, **options), inputs, list(inputs)).values())


@pytest.mark.parametrize(("kind", "V", "K"), [("hylo", 64, 64), ("mamba2", 64, 128), ("hylo", 128, 128)])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradients_from_saved_states_and_from_none(packed, kind, V, K):
    inputs = make(1, 4000, kind, V, K, BF16, states=4 if packed else 1, device="cuda")
    bounds = torch.tensor([0, 70, 70, 1500, 4000], dtype=torch.int32, device="cuda") if packed else None
    given = (*inputs.values(), bounds, True, None, False)
    o, final_state, states = cuda_chunk.forward(*given, save_states=True)
    assert states.shape[1] > 1
    grads = [torch.ones_like(o), torch.ones_like(final_state)]
    found, again = cuda_chunk.backward(grads, *given, states=states), cuda_chunk.backward(grads, *given)
    for name, one, other in zip(NAMES, found, again, strict=True):
        assert relative_error(one, other.double()) < 2e-3, name


@pytest.mark.parametrize("case", ssd_plain_cases.CASES, ids=lambda case: case.name)
def test_cuda_on_cuda_cores(case):
    """The emulated driver's cases."""
    ssd_plain_cases.run_and_check(case, "cuda")


def test_heads_in_parts():
    """32 heads share b and c: their gradients are sums of parts."""
    inputs = make(1, 300, "mamba2", 64, 128, BF16, device="cuda")
    for name in ("x", "dt", "a", "d", "dt_bias", "initial_state"):
        dim = {"x": 2, "dt": 2, "initial_state": 1}.get(name, 0)
        inputs[name] = inputs[name].repeat_interleave(8, dim)
    check_gradients(inputs, "triton")


@by_backend
@on_both_kernels
@pytest.mark.parametrize(("kind", "V", "K"), [("hylo", 64, 64), ("mamba2", 64, 128), ("grouped", 48, 80)])
def test_all_that_is_allocated_is_written(backend, dtype, kind, V, K):
    """Fresh memory is full of NaN here; compute-sanitizer's initcheck does not follow what the copy engine stores."""
    inputs = make(2, 333, kind, V, K, dtype, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        results, found = run_both_ways(inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in (*results, *found.values()))


@by_backend
@on_both_kernels
def test_nothing_waits_for_the_gpu(backend, dtype):
    inputs = make(1, 300, "hylo", 64, 64, dtype, states=2, device="cuda")
    cu = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    run_both_ways(inputs, backend, cu_seqlens=cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_both_ways(inputs, backend, cu_seqlens=cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@by_backend
@on_both_kernels
def test_a_graph_replays_it(backend, dtype):
    inputs = make(1, 300, "hylo", 64, 64, dtype, device="cuda")
    expected = run_both_ways(inputs, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_both_ways(inputs, backend)
    graph.replay()
    same((*found[0], *found[1].values()), (*expected[0], *expected[1].values()))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("bare", [False, True], ids=["options", "bare"])
@pytest.mark.parametrize("kind", HEADS)
@by_dtype
def test_both_take_the_whole_contract(dtype, kind, bare, packed):
    """Forward and backward: `chunk_why_not` stands for both."""
    for T, K, V in itertools.product((1, 65), (16, 48, 64, 128, 192, 256), (16, 64, 80, 128, 256)):
        inputs = make(1, T, kind, V, K, dtype, device="cuda")
        if bare:
            inputs |= dict.fromkeys(("d", "dt_bias", "initial_state"))
        cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device="cuda") if packed else None
        options = {"dt_softplus": True, "dt_limit": None, "fixed_split": False}
        assert triton.chunk_why_not(**inputs, cu_seqlens=cu_seqlens, **options) is None
        assert cuda.chunk_why_not(**inputs, cu_seqlens=cu_seqlens, **options) is None


@pytest.mark.parametrize(
    ("dtype", "V", "K", "forward", "backward"),
    [
        (BF16, 64, 64, "cuda", "cuda"),
        (FP16, 128, 128, "cuda", "cuda"),
        (BF16, 64, 256, "cuda", "triton"),
        (FP32, 64, 64, "cuda", "cuda"),
        (FP32, 64, 256, "cuda", "cuda"),
    ],
)
def test_the_default_is_the_fastest(dtype, V, K, forward, backward):
    inputs = make(1, 333, "hylo", V, K, dtype, device="cuda")
    results, found = run_both_ways(inputs, None)
    same(results, run_both_ways(inputs, forward)[0])
    same(found.values(), run_both_ways(inputs, backward)[1].values())


@by_backend
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("V", "K"), [*WIDTHS, (48, 80)])
def test_decode(backend, state_dtype, kind, V, K):
    inputs = make(3, 1, kind, V, K, BF16, states=5, device="cuda")
    pool = inputs.pop("initial_state").to(state_dtype)
    indices = torch.tensor([4, -1, 0], dtype=torch.int32, device="cuda")
    options = {"state_indices": indices, "dt_softplus": True, "dt_limit": (0.001, 0.1)}
    state, state_exact = pool.clone(), pool.double()
    with where_it_runs(backend):
        o = recurrent_ssd(**inputs, state=state, **options, backend=backend)
    o_exact = recurrent_ssd(**cast(inputs, torch.float64), state=state_exact, **options, backend="reference")
    near(o, o_exact, BF16, "o")
    near(state, state_exact, state_dtype, "state")
    assert torch.equal(state[1:4], pool[1:4])
    assert not o[1].any()


@by_backend
def test_decode_in_a_cuda_graph(backend):
    inputs = make(4, 1, "mamba2", 64, 128, BF16, device="cuda")
    state = inputs.pop("initial_state")
    start, graph = state.clone(), torch.cuda.CUDAGraph()
    with where_it_runs(backend):
        recurrent_ssd(**inputs, state=state, dt_softplus=True, backend=backend)
    once = state.clone()
    with torch.cuda.graph(graph):
        recurrent_ssd(**inputs, state=state, dt_softplus=True, backend=backend)
    state.copy_(start)
    graph.replay()
    assert torch.equal(state, once)
