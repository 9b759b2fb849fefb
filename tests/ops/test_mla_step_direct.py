"""Which calls of the decode step of latent attention skip torch's dispatcher, and what its CUDA kernels refuse."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from hylo_ops import cubin
from hylo_ops.fused import cuda_mla, mla_step
from tests.csrc.emulator import run_mla_absorb
from tests.csrc.emulator.run_mla_step import CPU, step
from tests.csrc.emulator.verdicts import NO_KERNEL, torch_that_fills
from tests.ops.layouts import shifted, strided
from tests.ops.mla_step_cases import SCALE, Case, arguments

UNSEEN = "a tensor has no memory to be seen"
WRONG_SHAPES = "the shapes are not the op's"
CASE = Case(4, 2, 16, 16, 16, 16, (5, 9), page=8, scales=2)


@pytest.fixture(scope="module")
def native():
    """It takes CPU tensors as if they were CUDA's, and finds no kernel."""
    if (reason := cubin.why_not_native()) is not None:
        pytest.skip(reason)
    return step(lambda *_: NO_KERNEL, lambda *_: NO_KERNEL)


@pytest.fixture
def direct(native, monkeypatch):
    """What each attempt to go around the dispatcher was answered."""
    answers = []

    def note(run, *given):
        answers.append(run(*given))
        return answers[-1]

    monkeypatch.setattr(cuda_mla, "direct", lambda: partial(note, native.direct))
    return answers


def call(**changes):
    return mla_step(**CASE.inputs("cpu") | {"scale": SCALE} | changes)


def test_a_plain_call_goes_around(direct):
    call()
    assert direct == [NO_KERNEL]


def test_a_weight_goes_around_without_gradients_only(direct):
    w_uk = torch.nn.Parameter(CASE.inputs("cpu")["w_uk"].clone())
    with torch.no_grad():
        call(w_uk=w_uk)
        call(w_uk=w_uk.detach())
    call(w_uk=w_uk)
    assert direct == [NO_KERNEL, NO_KERNEL, UNSEEN]


def test_a_compiler_and_another_backend_see_the_op(direct):
    torch.compile(lambda **x: mla_step(**x), fullgraph=True, backend="aot_eager")(**CASE.inputs("cpu"), scale=SCALE)
    call(backend="reference")
    assert direct == []


def test_wrong_input_gets_its_own_message(direct):
    with pytest.raises(ValueError, match=r"position must have shape \[2\], got \[3\]"):
        call(position=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="heads of q_nope must be a multiple of key_scale"):
        call(key_scale=3)
    with pytest.raises(RuntimeError, match="scale"):
        call(scale="small")
    assert direct == [WRONG_SHAPES, WRONG_SHAPES, "scale is no number"]


def test_the_native_function_counts_its_arguments(native):
    with pytest.raises(TypeError, match="fourteen arguments are expected"):
        native.direct(*range(13))


def test_results_are_allocated_as_compiled_graphs_allocate_theirs(monkeypatch):
    """No sequence, no kernel. Where torch has no such function, by its public one."""
    asked = []

    def note(*layout):
        asked.append(layout)
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2])

    monkeypatch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", note)
    attention = run_mla_absorb.native(lambda *_: NO_KERNEL)
    fast, general = (
        cubin.native().MlaStep(module, None, attention, device_type=CPU) for module in (torch, torch_that_fills())
    )
    of_sequences = {"q_nope", "q_rope", "kv_new", "cache_seqlens", "position", "cos", "sin", "block_table"}
    dtypes = (torch.bfloat16, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        x = replace(CASE, dtype=dtype).inputs("cpu")
        tensors = arguments(x | {name: x[name][:0] for name in of_sequences})
        for o in (fast.run(tensors, SCALE, None), general.run(tensors, SCALE, None)):
            assert (o.dtype, o.shape, o.stride()) == (dtype, (0, 1, 4, 16), (64, 64, 16, 1))
    assert asked == [((0, 1, 4, 16), (64, 64, 16, 1), dtype) for dtype in dtypes]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"w_uk": x["w_uk"].float()}, "q_nope, q_rope, kv_new, w_uk, w_uv and kv_cache are not of one dtype"),
        (lambda x: {"kv_cache": x["kv_cache"].half()}, "q_nope, q_rope, kv_new, w_uk, w_uv and kv_cache are not of"),
        (lambda x: {"position": x["position"].float()}, "cache_seqlens or position is not int32 or int64"),
        (lambda x: {"cos": x["cos"].int()}, "cos or sin is of no floating dtype"),
        (lambda x: {"q_nope": strided(x["q_nope"])}, "the last dim of q_nope is not contiguous"),
        (lambda x: {"w_uv": shifted(x["w_uv"])}, "the last dim of w_uv is not contiguous, or"),
        (lambda x: {"kv_new": strided(x["kv_new"])}, "the last dim of q_rope or of kv_new is not contiguous"),
        (lambda x: {"kv_cache": shifted(x["kv_cache"])}, "the last dim of kv_cache is not contiguous, or"),
        (lambda x: {"kv_cache": x["kv_cache"][:, :4]}, "pages of 4 tokens are not of a multiple of 8"),
        (lambda x: {"block_table": x["block_table"].float()}, "cache_seqlens, cache_starts or block_table are not"),
        (lambda x: {"w_uv": x["w_uv"][:, :, :8]}, WRONG_SHAPES),
        (lambda x: {"sin": x["sin"][..., :8]}, WRONG_SHAPES),
        (lambda x: {"kv_new": x["kv_new"][..., :8]}, WRONG_SHAPES),
    ],
)
def test_reasons(native, change, reason):
    x = CASE.inputs("cpu")
    assert native.why_not(arguments(x | change(x)), CASE.scales).startswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"nope": 24}, "nope is 24"), ({"nope": 144}, "nope is 144"), ({"v": 24}, "v is 24"), ({"E": 8}, "E is 8")],
)
def test_reasons_of_widths(native, changes, reason):
    case = replace(CASE, **changes)
    assert native.why_not(arguments(case.inputs("cpu")), case.scales).startswith(reason)


@pytest.mark.parametrize("columns", [0, -1, "two", 2.0])
def test_what_is_no_number_of_columns(native, columns):
    assert native.why_not(arguments(CASE.inputs("cpu")), columns) == "key_scale is no positive integer"


@pytest.mark.usefixtures("without_nvrtc")
def test_without_nvrtc_only_what_is_packaged_runs():
    assert cuda_mla._load(None, 0, "bf16", 112, 48, True) == "NVRTC is not installed"
