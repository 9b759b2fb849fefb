"""The decode steps' CUDA backend on a GPU: against float64, on the caller's stream, in graphs, and what it refuses."""

import itertools
import threading

import pytest
import torch

from hylo_ops import fused, recurrent_gated_delta_rule
from hylo_ops.gated_delta_rule import cuda_recurrent
from tests.ops.gated_delta_rule_step_cases import BF16, CASES, FP16, FP32, Case, run_and_check
from tests.ops.step_chains import check_chain, check_one_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PUBLISHED = [
    Case(K, V, dtype, state_dtype, raw, B=B, G=G, H=H, index=index)
    for (K, V, G, H), dtype, state_dtype, raw, (B, index) in itertools.product(
        [(64, 64, 32, 32), (128, 128, 16, 32), (256, 256, 8, 8), (256, 512, 6, 6)],
        [BF16, FP16],
        [FP32, BF16],
        [False, True],
        [(1, None), (33, torch.int32)],
    )
]
WIDTHS = [(K, V) for K in (16, 32, 80, 144, 208, 256) for V in (16, 48, 112, 272, 512)]
GATES = [(FP32, FP32), (BF16, FP16)]
CONTRACT = [  # any width in 16s, each with another combination of types
    Case(K, V, dtype, state_dtype, raw, G=1, H=2, gate_dtypes=gates)
    for (K, V), (dtype, state_dtype, raw, gates) in zip(
        WIDTHS,
        itertools.cycle(itertools.product([BF16, FP16, FP32], [FP32, BF16], [False, True], GATES)),
        strict=False,
    )
]


@pytest.mark.parametrize("case", CASES + PUBLISHED + CONTRACT, ids=lambda case: case.name)
def test_agrees_with_float64(case):
    run_and_check(case, "cuda")


def call_of(raw, **changes):
    """A call without arguments, its state, and what it gives on the state as it was."""
    inputs = Case(128, 128, raw=raw, index=None).inputs("cuda") | changes
    function = fused.gated_delta_rule_step if raw else recurrent_gated_delta_rule
    state = inputs["state"]
    start = state.clone()
    expected = function(**inputs, backend="cuda"), state.clone()
    state.copy_(start)
    return lambda: function(**inputs, backend="cuda"), state, expected


@pytest.mark.parametrize("raw", [False, True])
def test_the_default_goes_around_the_dispatcher(raw, monkeypatch):
    seen = []
    direct = cuda_recurrent.direct
    monkeypatch.setattr(cuda_recurrent, "direct", lambda *arguments: seen.append(direct(*arguments)) or seen[-1])
    inputs = Case(128, 128, raw=raw).inputs("cuda")
    function = fused.gated_delta_rule_step if raw else recurrent_gated_delta_rule
    assert function(**inputs) is seen[0]


@pytest.mark.parametrize("raw", [False, True])
def test_a_graph_replays_it(raw):
    call, state, (o_expected, state_expected) = call_of(raw)
    start, graph = state.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    assert torch.equal(state, start)
    graph.replay()
    assert torch.equal(o, o_expected)
    assert torch.equal(state, state_expected)


@pytest.mark.parametrize("raw", [False, True])
def test_it_runs_on_the_callers_stream_without_synchronising(raw):
    call, state, (o_expected, state_expected) = call_of(raw)
    stream, start = torch.cuda.Stream(), state.clone()
    state.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # about 50 ms: a launch elsewhere would not wait, and meet zeros
            state.copy_(start)
            o = call()
        assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(o, o_expected)
    assert torch.equal(state, state_expected)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("B", [1, 40])
def test_waits_for_what_kernels_ahead_write(B, settled):
    """Each step's tensors, but for the state and its indices, are what the product ahead of it gives."""
    case = Case(128, 128, raw=True, B=B, G=8, H=8)
    inputs, sizes = case.inputs("cuda"), [1024, 1024, 1024, 8, 8]
    options = {name: inputs[name] for name in ("A_log", "dt_bias", "state_indices")}

    def step(projected, states, settled):
        q, k, v, a, b = projected.split(sizes, dim=-1)
        q, k, v = (t.unflatten(-1, (8, 128)) for t in (q, k, v))
        gates = {"a": a, "b": b, "scale": 1.0}
        o = fused.gated_delta_rule_step(q, k, v, **gates, **states, **options, settled_state=settled, backend="cuda")
        return o.flatten(2)

    weights = [torch.randn(sum(sizes), 1024, device="cuda", dtype=BF16) / 32 for _ in range(12)]
    states = [{"state": inputs["state"].clone()} for _ in weights]
    check_chain(step, torch.randn(B, 1, 1024, device="cuda", dtype=BF16), weights, states, settled)


@pytest.mark.parametrize("raw", [False, True])
def test_a_state_that_the_kernel_ahead_writes_is_read_after_it(raw):
    call, state, _ = call_of(raw)
    check_one_state(call, [state])


def test_another_thread_may_call_it():
    call, state, (_, state_expected) = call_of(False)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert torch.equal(state, state_expected)


@pytest.mark.parametrize("raw", [False, True])
def test_a_compiled_call_equals_the_direct_one(raw):
    call, state, (o_expected, state_expected) = call_of(raw)
    o = torch.compile(call, fullgraph=True)()
    assert torch.equal(o, o_expected)
    assert torch.equal(state, state_expected)


@pytest.mark.parametrize("cubin_source", ["packaged", "nvrtc"])
def test_both_sources_of_device_code(cubin_source):
    inputs = Case(128, 128, index=None).inputs("cuda")
    tensors = [inputs[name] for name in ("q", "k", "v", "g", "beta")]
    states = [inputs["state"].clone() for _ in range(2)]
    o = cuda_recurrent.forward(*tensors, states[0], 0.3, None, cubin_source=cubin_source)
    assert torch.equal(o, recurrent_gated_delta_rule(*tensors, states[1], scale=0.3, backend="cuda"))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("q", lambda q: q.float(), "q, k and v are not of one dtype"),
        ("state", lambda state: state.double(), "the state is not float32 or bfloat16"),
        ("v", lambda v: torch.stack([v, v], -1)[..., 0], "the last dim of v is not contiguous"),
    ],
)
def test_it_names_its_reasons(name, change, reason):
    inputs = Case(128, 128).inputs("cuda")
    with pytest.raises(NotImplementedError, match=f"cuda: {reason}"):
        recurrent_gated_delta_rule(**inputs | {name: change(inputs[name])}, backend="cuda")
