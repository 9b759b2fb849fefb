"""The SSD decode steps' CUDA backend on a GPU: against float64, on the caller's stream, in graphs, again and again."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch

from hylo_ops import fused, recurrent_ssd
from hylo_ops.ssd import cuda_mamba2, cuda_recurrent
from hylo_ops.testing import within_budget
from tests.ops.ssd_step_cases import (
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    MAMBA2_CASES,
    MANY,
    STATES,
    Case,
    Mamba2Case,
    run_and_check,
)
from tests.ops.step_chains import check_chain, check_one_state

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PATTERNS = [(32, 1, 1), (8, 8, 32), (32, 32, 32), (8, 4, 16)]  # heads of x, b, c of 32
TYPES = list(itertools.product([BF16, FP16, FP32], [FP32, BF16]))
BATCHES = [(1, None), (2, torch.int64), (67, torch.int32)]  # few states and many
SHARING = [
    case(K, V, dtype, state_dtype, B=B, H=32, shared=shared, index=index)
    for case in (Case, Mamba2Case)
    for (K, V), shared, (dtype, state_dtype), (B, index) in itertools.product(
        [(64, 64), (128, 64)], PATTERNS, TYPES, BATCHES
    )
]
NORMS = [  # of 1, 8 and 32 heads, which are more than a block's, all of it and less
    Mamba2Case(128, 64, H=32, shared=shared, norms=norms, norm_before_gate=first, B=33)
    for shared, norms, first in itertools.product(PATTERNS, [1, 4, 32], [False, True])
]
PUBLISHED = [
    Mamba2Case(K, V, BF16, state_dtype, B=B, H=H, shared=shared, norms=norms, index=index)
    for (H, V, K, shared, norms), state_dtype, (B, index) in itertools.product(
        [
            (24, 128, 128, (8, 8, 24), 24),  # HyLo 3B
            (16, 128, 128, (8, 8, 16), 16),  # HyLo of Qwen
            (24, 64, 128, (24, 1, 1), 1),  # Mamba2 130M
            (80, 64, 128, (80, 1, 1), 1),  # Mamba2 2.7B
            (128, 64, 128, (128, 8, 8), 8),  # eight groups
            (24, 64, 256, (24, 1, 1), 1),
        ],
        [FP32, BF16],
        [(1, None), (33, torch.int32)],
    )
]
WIDTHS = [(K, V) for K in (16, 32, 80, 144, 208, 256) for V in (16, 48, 112, 272)]
GATES = [(FP32, FP32, FP32, FP32), (BF16, FP32, FP16, BF16), (FP16, FP64, None, None)]
CONTRACT = [  # any width in 16s, each with another combination of types
    case(K, V, dtype, state_dtype, H=6, shared=shared, gate_dtypes=gates, strided=strided, dt_limit=limit)
    for case in (Case, Mamba2Case)
    for (K, V), (dtype, state_dtype), shared, gates, strided, limit in zip(
        WIDTHS,
        itertools.cycle(TYPES),
        itertools.cycle([(6, 1, 1), (2, 3, 6), (1, 2, 3), (6, 6, 6), (3, 3, 1)]),
        itertools.cycle(GATES),
        itertools.cycle([False, False, True]),
        itertools.cycle([None, (0.1, 0.5)]),
        strict=False,
    )
]
BLOCKS = [  # prime numbers of heads, widths of the convolution, types of its state and of the weights
    Mamba2Case(64, 64, BF16, FP32, B=2, H=23, shared=(23, 1, 1), conv_dtype=FP32),
    Mamba2Case(64, 64, BF16, FP32, B=70, H=23, shared=(1, 23, 1), norms=23, weight_dtype=FP32),
    Mamba2Case(64, 64, FP16, BF16, H=32, shared=(8, 8, 32), norms=32, W=3, conv_bias=False),
    Mamba2Case(64, 64, FP32, FP32, H=32, shared=(8, 8, 32), norms=32, W=2, conv_dtype=BF16, weight_dtype=FP16),
    Mamba2Case(128, 64, BF16, FP32, B=3, H=256, shared=(256, 256, 256)),
]
ALL = list(dict.fromkeys([*CASES, *MANY, *MAMBA2_CASES, *SHARING, *NORMS, *PUBLISHED, *CONTRACT, *BLOCKS]))


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{type(case).__name__}-{case.name}")
def test_agrees_with_float64(case):
    run_and_check(case, "cuda")


STEP = Case(128, 64, H=32, shared=(32, 1, 1), index=None)
MAMBA2 = Mamba2Case(128, 64, H=32, shared=(32, 1, 1), index=None)
HYLO = Mamba2Case(64, 64, H=32, shared=(8, 8, 32), norms=32, index=None)
EACH = pytest.mark.parametrize("case", [STEP, MAMBA2, HYLO], ids=["recurrent_ssd", "mamba2", "hylo"])


class Call:
    """A call of a case without arguments, its states, and what it makes of them as they were."""

    def __init__(self, case):
        self.function, self.inputs = case.function(), case.inputs("cuda")
        self.states = {name: self.inputs[name] for name in STATES if name in self.inputs}
        self.start = {name: t.clone() for name, t in self.states.items()}
        self.expected = self()
        self.after = {name: t.clone() for name, t in self.states.items()}
        self.reset()

    def __call__(self):
        return self.function(**self.inputs, backend="cuda")

    def reset(self):
        for name, t in self.states.items():
            t.copy_(self.start[name])

    def is_as_expected(self, o):
        return torch.equal(o, self.expected) and all(torch.equal(t, self.after[n]) for n, t in self.states.items())


@EACH
@pytest.mark.parametrize("B", [1, 40])
def test_thousands_of_repeats_are_equal(case, B):
    call = Call(replace(case, B=B))
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(3000):
        call.reset()
        differ |= (call() != call.expected).any()
        for name, t in call.states.items():
            differ |= (t != call.after[name]).any()
    assert not differ


@EACH
def test_a_sequence_alone_gives_the_same_bits(case):
    """As one of few that it is one of: blocks are as many to a sequence as before."""
    call = Call(replace(case, B=3))
    one = dict(call.inputs)
    for name in {"x", "b", "c", "z", "xbc", "dt", *STATES} & one.keys():
        one[name] = call.inputs[name][1:2].clone()
    o = call.function(**one, backend="cuda")
    assert torch.equal(o, call.expected[1:2])
    for name in call.states:
        assert torch.equal(one[name], call.after[name][1:2])


@EACH
def test_a_long_walk_stays_with_the_reference(case):
    """A thousand steps with new inputs: each state that a step leaves is the next one's."""
    call = Call(replace(case, B=2, state_dtype=FP32, dtype=FP32))
    inputs = {name: t.double() if torch.is_tensor(t) else t for name, t in call.inputs.items()}
    plain = {name: t.clone() if torch.is_tensor(t) else t for name, t in call.inputs.items()}
    generator = torch.Generator(device="cuda").manual_seed(1)
    moving = [name for name in ("x", "b", "c", "z", "xbc", "dt") if name in inputs]
    for _ in range(1000):
        for name in moving:
            call.inputs[name].normal_(generator=generator)
            inputs[name].copy_(call.inputs[name])
            plain[name].copy_(call.inputs[name])
        o = call()
        exact = call.function(**inputs, backend="reference")
        eager = call.function(**plain, backend="reference")
    within_budget(o, eager, exact, "o")
    for name in call.states:
        within_budget(call.inputs[name], plain[name], inputs[name], name)


@EACH
def test_the_default_goes_around_the_dispatcher(case, monkeypatch):
    seen = []
    module = cuda_recurrent if case is STEP else cuda_mamba2
    direct = module.direct()

    def noted(*arguments):
        seen.append(direct(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "direct", lambda: noted)
    assert case.function()(**case.inputs("cuda")) is seen[0]


@EACH
def test_a_graph_replays_it(case):
    call, graph = Call(replace(case, index=torch.int32)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    assert all(torch.equal(t, call.start[name]) for name, t in call.states.items())
    for _ in range(3):
        call.reset()
        graph.replay()
        assert call.is_as_expected(o)


@EACH
def test_a_graph_follows_its_indices(case):
    call, graph = Call(replace(case, index=torch.int32)), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = call()
    call.inputs["state_indices"].copy_(torch.tensor([0, 3, -1]))
    graph.replay()
    got, states = o.clone(), {name: t.clone() for name, t in call.states.items()}
    call.reset()
    assert torch.equal(call(), got)
    assert all(torch.equal(t, states[name]) for name, t in call.states.items())
    assert not got[2].any()
    assert torch.equal(states["state"][1:3], call.start["state"][1:3])


@EACH
def test_it_runs_on_the_callers_stream_without_synchronising(case):
    call, stream = Call(case), torch.cuda.Stream()
    for t in call.states.values():
        t.zero_()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # about 50 ms: a launch elsewhere would not wait, and meet zeros
            call.reset()
            o = call()
        assert not stream.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert call.is_as_expected(o)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("B", [1, 40])
@pytest.mark.parametrize("case", [MAMBA2, HYLO], ids=["mamba2", "hylo"])
def test_waits_for_what_kernels_ahead_write(case, B, settled):
    """Each step's z, xbc and dt are what the product ahead of it gives."""
    inputs = replace(case, B=B, index=torch.int32).inputs("cuda")
    parts = {name: inputs.pop(name).flatten(2) for name in ("z", "xbc", "dt")}
    first = {name: inputs.pop(name) for name in STATES}

    def step(projected, states, settled):
        z, xbc, dt = projected.split([t.shape[-1] for t in parts.values()], dim=-1)
        z = z.unflatten(-1, (case.H, case.V))
        y = fused.mamba2_step(z, xbc, dt, **inputs, **states, settled_state=settled, backend="cuda")
        return y.flatten(2)

    x = parts["z"]
    rows = sum(t.shape[-1] for t in parts.values())
    weights = [torch.randn(rows, x.shape[-1], device="cuda", dtype=BF16) / x.shape[-1] ** 0.5 for _ in range(12)]
    states = [{name: t.clone() for name, t in first.items()} for _ in weights]
    check_chain(step, x, weights, states, settled)


@EACH
@pytest.mark.parametrize("B", [1, 40])
def test_a_state_that_the_kernel_ahead_writes_is_read_after_it(case, B):
    call = Call(replace(case, B=B))
    check_one_state(call, list(call.states.values()))


@EACH
def test_another_thread_may_call_it(case):
    call, results = Call(case), []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    assert call.is_as_expected(results[0])


@EACH
def test_a_compiled_call_equals_the_direct_one(case):
    call = Call(case)
    o = torch.compile(call.function, fullgraph=True)(**call.inputs, backend="cuda")
    assert call.is_as_expected(o)


@EACH
@pytest.mark.parametrize("cubin_source", ["packaged", "nvrtc"])
def test_both_sources_of_device_code(case, cubin_source):
    call = Call(case)
    x = {"d": None, "dt_bias": None, "state_indices": None, "norm_before_gate": False, "settled_state": False}
    x |= call.inputs
    gates = ("d", "dt_bias", "state_indices")
    if case is STEP:
        names, module = ("x", "dt", "a", "b", "c", "state", *gates, "dt_softplus", "dt_limit"), cuda_recurrent
    else:
        tensors = ("z", "xbc", "dt", "conv_weight", "conv_bias", "a", "norm_weight", "conv_state", "state", *gates)
        options = ("d_state", "x_heads", "b_heads", "dt_softplus", "dt_limit", "eps", "norm_before_gate")
        names, module = (*tensors, *options, "settled_state"), cuda_mamba2
    assert call.is_as_expected(module.forward(*(x[name] for name in names), cubin_source=cubin_source))


@pytest.mark.parametrize("case", [MAMBA2, HYLO], ids=["mamba2", "hylo"])
def test_views_of_one_projection(case):
    """As a model has them: the strides of a batch are odd, and no tensor but the first starts at a round address."""
    call = Call(replace(case, B=5))
    z, xbc, dt = (call.inputs[name] for name in ("z", "xbc", "dt"))
    odd = torch.full((5, 1, 3), torch.nan, dtype=z.dtype, device="cuda")
    joined = torch.cat([z.flatten(2), odd, xbc, dt.to(z.dtype), odd], dim=-1)
    views = joined.split([z[0].numel(), 3, xbc.shape[2], dt.shape[2], 3], dim=-1)
    call.inputs |= {"z": views[0].unflatten(-1, z.shape[2:]), "xbc": views[2], "dt": views[3]}
    assert call.is_as_expected(call())


def test_fused_and_composed_agree():
    """Within what rounding after each op does, against float64."""
    call = Call(HYLO)
    inputs = call.inputs | {name: t.clone() for name, t in call.start.items()}
    exact = {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in inputs.items()}
    y_exact = fused.mamba2_step(**exact, backend="reference")
    y = fused.mamba2_step(**inputs, backend="composed")
    within_budget(call.expected, y, y_exact, "y")
    within_budget(call.after["state"], inputs["state"], exact["state"], "state")
    assert torch.equal(call.after["conv_state"], inputs["conv_state"])


@EACH
def test_offsets_past_2_31_elements(case):
    x = replace(case, B=1, state_dtype=BF16, index=torch.int64).inputs("cuda")
    heads, values, width = x["state"].shape[1:]
    rows = (1 << 31) // (heads * values * width) + 2
    small = {name: x[name][2:].clone() for name in STATES if name in x}
    expected = case.function()(**x | small | {"state_indices": None}, backend="cuda")
    state = torch.empty(rows, heads, values, width, dtype=BF16, device="cuda")
    state[-1] = x["state"][2]
    large = {"state": state, "state_indices": torch.tensor([rows - 1], device="cuda")}
    if "conv_state" in x:
        large["conv_state"] = x["conv_state"][2:].expand(rows, -1, -1).contiguous()
    o = case.function()(**x | large, backend="cuda")
    assert torch.equal(o, expected)
    assert torch.equal(state[-1], small["state"][0])


@pytest.mark.parametrize(
    ("case", "name", "change", "reason"),
    [
        (STEP, "x", lambda x: x.float(), "x, b and c are not of one dtype|b must be float32"),
        (STEP, "state", lambda state: state.double(), "the state is not float32 or bfloat16"),
        (STEP, "c", lambda c: torch.stack([c, c], -1)[..., 0], "the last dim of c is not contiguous"),
        (MAMBA2, "state", lambda state: state.double(), "the state is not float32 or bfloat16"),
        (MAMBA2, "norm_weight", lambda weight: weight.float(), "conv_weight, conv_bias and norm_weight are not of one"),
        (MAMBA2, "z", lambda z: torch.stack([z, z], -1)[..., 0], "the last dim of z or of xbc is not contiguous"),
    ],
)
def test_it_names_its_reasons(case, name, change, reason):
    inputs = case.inputs("cuda")
    with pytest.raises((NotImplementedError, ValueError), match=reason):
        case.function()(**inputs | {name: change(inputs[name])}, backend="cuda")


def test_what_it_refuses_others_take():
    inputs = MAMBA2.inputs("cuda")
    refused = inputs | {"norm_weight": inputs["norm_weight"].float()}
    states = {name: inputs[name].clone() for name in STATES}
    y = fused.mamba2_step(**refused)
    assert torch.equal(y, fused.mamba2_step(**refused | states, backend="composed"))
    step = STEP.inputs("cuda")
    wide = {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in step.items()}
    assert recurrent_ssd(**wide).dtype == torch.float64
