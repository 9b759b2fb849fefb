"""The fast backends of gated_delta_rule on a GPU, against float64."""

import itertools

import pytest
import torch

from hylo_ops import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo_ops.gated_delta_rule import cuda, cuda_chunk, triton
from hylo_ops.testing import cast, gradients, relative_error
from tests.ops import gated_delta_rule_fp32_cases as fp32_cases
from tests.ops.gated_delta_rule_cases import GATES, WIDTHS, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BACKENDS = ["cuda", "triton"]
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
HALVES = [torch.bfloat16, torch.float16]


def near(found, exact, dtype, name):
    """Products of 16-bit operands: all errs like a few roundings to 16 bits, and float32 like float32."""
    unit = relative_error(exact.to(dtype), exact)
    limit = 5e-6 if dtype == torch.float32 else 3 * unit
    assert relative_error(found, exact) <= limit, f"{name}: {relative_error(found, exact):.2e}, limit {limit:.2e}"


def exactly(inputs, **options):
    return chunk_gated_delta_rule(**cast(inputs, torch.float64), backend="reference", **options)


def check(inputs, backend, **options):
    o, state = chunk_gated_delta_rule(**inputs, backend=backend, **options)
    o_exact, state_exact = exactly(inputs, **options)
    near(o, o_exact, inputs["q"].dtype, "o")
    near(state, state_exact, inputs["q"].dtype, "final_state")
    return o, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("K", "V"), [*WIDTHS, (48, 80), (144, 112)])
def test_forward(backend, dtype, gates, K, V):
    inputs = make(2, 333, 2, 4, K, V, dtype, gates, device="cuda")
    first = check(inputs, backend)
    second = chunk_gated_delta_rule(**inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("K", "V"), [(48, 80), (64, 64), (128, 128), (256, 512)])
def test_in_fp32(backend, gates, K, V):
    inputs = make(2, 333, 2, 4, K, V, torch.float32, gates, device="cuda")
    first = check(inputs, backend)
    second = chunk_gated_delta_rule(**inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", fp32_cases.CASES, ids=lambda case: case.name)
def test_cuda_in_fp32_both_ways(case):
    """The emulated driver's cases."""
    fp32_cases.run_and_check(case, "cuda")


@pytest.mark.parametrize("gates", ["fast", "slow"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 512)])
def test_long_sequences_in_fp32(gates, K, V):
    check(make(1, 8192, 2, 2, K, V, torch.float32, gates, device="cuda"), "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 129])
def test_lengths(backend, dtype, T):
    check(make(2, T, 1, 2, 64, 64, dtype, "fast", device="cuda"), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_state_and_with_a_scale(backend):
    inputs = make(2, 200, 2, 2, 128, 128, torch.bfloat16, "fast", device="cuda")
    inputs["initial_state"] = None
    check(inputs, backend, scale=0.3)


@pytest.mark.parametrize("gates", ["fast", "slow"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 512)])
def test_long_sequences_are_cut_into_segments(gates, K, V):
    inputs = make(1, 8192, 2, 2, K, V, torch.bfloat16, gates, device="cuda")
    sizes = cuda_chunk._Sizes(1, 8192, 2, 2, K, V, 1, 128)
    assert cuda_chunk._segments(sizes, cuda_chunk._multiprocessors(0)) > 1
    o, state = check(inputs, "cuda")
    o_whole, state_whole = chunk_gated_delta_rule(**inputs, backend="cuda", fixed_split=True)
    if gates == "slow":  # every cut is too early to forget what came before
        assert torch.equal(o, o_whole)
        assert torch.equal(state, state_whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 512)])
def test_packed_sequences_equal_single_ones_and_keep_to_themselves(backend, dtype, K, V):
    bounds = [0, 70, 70, 71, 300, 900, 900]
    inputs = make(1, 900, 2, 4, K, V, dtype, "fast", len(bounds) - 1, device="cuda")
    inputs["v"][:, 71:300] = torch.nan
    cu = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    o, final = chunk_gated_delta_rule(**inputs, cu_seqlens=cu, fixed_split=True, backend=backend)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = {name: inputs[name][:, begin:end] for name in NAMES[:-1]}
        state = inputs["initial_state"][n : n + 1]
        o_n, final_n = chunk_gated_delta_rule(**alone, initial_state=state, fixed_split=True, backend=backend)
        assert torch.equal(o[:, begin:end].nan_to_num(7), o_n.nan_to_num(7))
        assert torch.equal(final[n : n + 1].nan_to_num(7), final_n.nan_to_num(7))
        assert torch.isfinite(final[n]).all() == (n != 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_invariant_with_fixed_split(backend):
    inputs = make(3, 2048, 2, 2, 128, 128, torch.bfloat16, "fast", device="cuda")
    o, state = chunk_gated_delta_rule(**inputs, fixed_split=True, backend=backend)
    one = {name: tensor[1:2] for name, tensor in inputs.items()}
    o_one, state_one = chunk_gated_delta_rule(**one, fixed_split=True, backend=backend)
    assert torch.equal(o[1:2], o_one)
    assert torch.equal(state[1:2], state_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_strided_views_are_read_in_place(dtype):
    inputs = make(2, 200, 4, 4, 128, 128, dtype, "fast", device="cuda")
    joined = torch.cat([inputs[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    views = dict(zip(("q", "k", "v"), (t.unflatten(-1, (4, 128)) for t in joined.split(512, -1)), strict=True))
    assert cuda.chunk_why_not(**{**inputs, **views}) is None
    o, _ = chunk_gated_delta_rule(**{**inputs, **views}, backend="cuda")
    assert torch.equal(o, chunk_gated_delta_rule(**inputs, backend="cuda")[0])


def check_gradients(inputs, backend, **options):
    dtype = inputs["q"].dtype
    exact = gradients(chunk_gated_delta_rule, cast(inputs, torch.float64) | {"backend": "reference"} | options, NAMES)
    found = gradients(chunk_gated_delta_rule, inputs | {"backend": backend} | options, NAMES)
    again = gradients(chunk_gated_delta_rule, inputs | {"backend": backend} | options, NAMES)
    for name, gradient in found.items():
        assert torch.equal(gradient, again[name]), name
        unit = relative_error(exact[name].to(dtype), exact[name])
        # On cuda a gate's gradient with slow gates errs by 5.4 roundings.
        limit = 1e-5 if dtype == torch.float32 else (8 if (backend, name) == ("cuda", "g") else 5) * unit
        assert relative_error(gradient, exact[name]) <= limit, f"{name}: {relative_error(gradient, exact[name]):.2e}"


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("K", "V"), [(48, 80), (64, 64), (128, 128), (256, 512)])
def test_gradients_of_triton(gates, dtype, K, V):
    check_gradients(make(1, 333, 2, 4, K, V, dtype, gates, device="cuda"), "triton")


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("K", "V"), [*WIDTHS, (48, 80), (144, 112), (256, 256)])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=["H=G", "H=3G"])
def test_gradients_of_cuda(gates, dtype, K, V, heads):
    check_gradients(make(1, 333, *heads, K, V, dtype, gates, device="cuda"), "cuda")


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(("K", "V"), [*WIDTHS, (48, 80), (144, 112)])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3)], ids=["H=G", "H=3G"])
def test_gradients_of_cuda_in_fp32(gates, K, V, heads):
    check_gradients(make(1, 333, *heads, K, V, torch.float32, gates, device="cuda"), "cuda")


@pytest.mark.parametrize("gates", ["fast", "slow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (256, 512)])
def test_gradients_of_long_sequences(gates, dtype, K, V):
    """In bf16 they are cut into segments."""
    check_gradients(make(1, 4096, 2, 2, K, V, dtype, gates, device="cuda"), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("K", "V"), [(64, 128), (128, 128), (256, 64)])
def test_gradients_of_packed_sequences_keep_to_themselves(dtype, K, V):
    """The neighbour's NaN reaches nobody else's gradients, and a sequence has those that it has alone."""
    bounds = [0, 70, 70, 71, 300, 900, 900]
    inputs = make(1, 900, 2, 4, K, V, dtype, "fast", len(bounds) - 1, device="cuda")
    inputs["v"][:, 71:300] = torch.nan
    inputs["k"][:, 71:300] = torch.nan
    cu = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    leaves = {name: inputs[name].detach().requires_grad_() for name in NAMES}
    o, final = chunk_gated_delta_rule(**leaves, cu_seqlens=cu, fixed_split=True, backend="cuda")
    found = torch.autograd.grad((o, final), list(leaves.values()), (torch.ones_like(o), torch.ones_like(final)))
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if n == 3:
            continue
        alone = {name: inputs[name][:, begin:end].detach().requires_grad_() for name in NAMES[:-1]}
        alone["initial_state"] = inputs["initial_state"][n : n + 1].detach().requires_grad_()
        o_n, final_n = chunk_gated_delta_rule(**alone, fixed_split=True, backend="cuda")
        ones = torch.ones_like(o_n), torch.ones_like(final_n)
        expected = torch.autograd.grad((o_n, final_n), list(alone.values()), ones)
        for name, whole, single in zip(NAMES, found, expected, strict=True):
            part = whole[n : n + 1] if name == "initial_state" else whole[:, begin:end]
            assert torch.isfinite(part).all(), (n, name)
            assert torch.equal(part, single), (n, name)


@pytest.mark.parametrize(("K", "V"), [(64, 64), (64, 128), (128, 128), (112, 80)])
def test_passes_that_solve_have_the_bits_of_those_that_read_records(K, V):
    """Many chains are solved within the pass; with `fixed_split` every call reads records."""
    lengths = [0, 70, 64, 1, 130] * 14
    bounds = [0, *itertools.accumulate(lengths)]
    inputs = make(1, bounds[-1], 1, 2, K, V, torch.bfloat16, "hostile", len(lengths), device="cuda")
    for name in ("q", "k", "v"):
        inputs[name][:, bounds[6] : bounds[7]] = torch.nan
    ours = torch.ones(bounds[-1], dtype=torch.bool, device="cuda")
    ours[bounds[6] : bounds[7]] = False
    options = torch.tensor(bounds, dtype=torch.int32, device="cuda"), K**-0.5
    found, expected = (
        [
            *cuda_chunk.forward(*inputs.values(), *options, fixed),
            *cuda_chunk.backward(ones, *inputs.values(), *options, fixed),
        ]
        for fixed in (False, True)
        for ones in [[torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])]]
    )
    for a, b in zip(found, expected, strict=True):
        a, b = (x[:, ours] if x.shape[0] == 1 else x[torch.arange(len(lengths)) != 6] for x in (a, b))
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("K", "V"), [(48, 80), (64, 64), (128, 128), (256, 512)])
def test_all_that_is_allocated_is_written(dtype, K, V):
    """Fresh memory is full of NaN here; compute-sanitizer's initcheck does not follow what the copy engine stores."""
    inputs = make(2, 333, 1, 2, K, V, dtype, "fast", device="cuda")
    ones = [torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])]
    options = None, K**-0.5, False
    torch.use_deterministic_algorithms(True)
    try:
        results = (
            *cuda.chunk_forward(*inputs.values(), *options),
            *cuda.chunk_backward(ones, *inputs.values(), *options),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(result).all() for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gradients_of_strided_views(dtype):
    inputs = make(2, 200, 4, 4, 128, 128, dtype, "fast", device="cuda")
    joined = torch.cat([inputs[name].flatten(2) for name in ("q", "k", "v")], dim=-1)
    views = dict(zip(("q", "k", "v"), (t.unflatten(-1, (4, 128)) for t in joined.split(512, -1)), strict=True))
    options = None, 128**-0.5, False
    ones = [torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])]
    found = cuda.chunk_backward(ones, *{**inputs, **views}.values(), *options)
    expected = cuda.chunk_backward(ones, *inputs.values(), *options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_the_default_runs_on_cuda_both_ways(dtype):
    inputs = make(1, 333, 2, 4, 128, 128, dtype, "fast", device="cuda")
    found = gradients(chunk_gated_delta_rule, inputs, NAMES)
    on_cuda = gradients(chunk_gated_delta_rule, inputs | {"backend": "cuda"}, NAMES)
    assert all(torch.equal(found[name], on_cuda[name]) for name in NAMES)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_the_whole_contract_has_a_fast_backend(dtype, with_state, packed):
    for K, V in itertools.product((16, 48, 64, 128, 192, 256), (16, 80, 128, 256, 512)):
        for T in (1, 63, 64, 130):
            inputs = make(1, T, 1, 2, K, V, dtype, "fast", device="cuda")
            inputs["initial_state"] = inputs["initial_state"] if with_state else None
            cu = torch.tensor([0, T], dtype=torch.int32, device="cuda") if packed else None
            arguments = {**inputs, "cu_seqlens": cu, "scale": 1.0, "fixed_split": False}
            assert triton.chunk_why_not(**arguments) is None
            assert cuda.chunk_why_not(**arguments) is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("K", "V"), WIDTHS)
def test_decode(backend, state_dtype, K, V):
    inputs = make(3, 1, 2, 4, K, V, torch.bfloat16, "fast", 5, device="cuda")
    pool = inputs.pop("initial_state").to(state_dtype)
    indices = torch.tensor([4, -1, 0], dtype=torch.int32, device="cuda")
    state, state_exact = pool.clone(), pool.double()
    o = recurrent_gated_delta_rule(**inputs, state=state, state_indices=indices, backend=backend)
    exact = cast(inputs, torch.float64)
    o_exact = recurrent_gated_delta_rule(**exact, state=state_exact, state_indices=indices, backend="reference")
    near(o, o_exact, torch.bfloat16, "o")
    near(state, state_exact, state_dtype, "state")
    assert torch.equal(state[1:4], pool[1:4])
    assert not o[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_in_a_cuda_graph(backend):
    inputs = make(4, 1, 2, 4, 128, 128, torch.bfloat16, "fast", device="cuda")
    state = inputs.pop("initial_state")
    start = state.clone()
    call = torch.cuda.CUDAGraph()
    recurrent_gated_delta_rule(**inputs, state=state, backend=backend)
    once = state.clone()
    with torch.cuda.graph(call):
        recurrent_gated_delta_rule(**inputs, state=state, backend=backend)
    state.copy_(start)
    call.replay()
    assert torch.equal(state, once)


def test_the_cuda_backend_names_its_reasons():
    inputs = make(1, 64, 1, 1, 64, 64, torch.bfloat16, "fast", device="cuda")
    for change, reason in (
        ({"q": inputs["q"].double(), "k": inputs["k"].double(), "v": inputs["v"].double()}, "float64"),
        ({"v": inputs["v"].float()}, "float32"),
        ({"v": inputs["v"][..., :40]}, "V is 40"),
        ({"q": inputs["q"][..., :40], "k": inputs["k"][..., :40]}, "K is 40"),
    ):
        assert reason in cuda.chunk_why_not(**{**inputs, "initial_state": None, **change})
    wide = {**inputs, **{name: inputs[name].float() for name in ("q", "k", "v")}, "initial_state": None}
    assert "V is 40" in cuda.chunk_why_not(**{**wide, "v": wide["v"][..., :40]})
    assert "bfloat16" in cuda.chunk_why_not(**{**wide, "k": inputs["k"]})
    assert "aligned" in cuda.chunk_why_not(**{**wide, "v": wide["v"].new_empty(1, 64, 1, 65)[..., 1:]})
