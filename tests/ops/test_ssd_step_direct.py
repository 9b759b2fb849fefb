"""Which calls of the SSD decode steps skip torch's dispatcher, and which do not; and what their kernels refuse."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_ops import cubin
from hylo_ops.ssd import cuda_mamba2, cuda_recurrent
from tests.csrc.emulator.run_ssd_step import natives
from tests.ops.layouts import shifted, strided
from tests.ops.ssd_step_cases import Case, Mamba2Case

NO_KERNEL = "there is no kernel in this test"
UNSEEN = "a tensor has no memory to be seen"
WRONG_SHAPES = "the shapes are not the op's"
STEP = Case(32, 16, B=2, index=None)
BLOCK = Mamba2Case(32, 16, B=2, index=None)
BOTH = pytest.mark.parametrize("case", [STEP, BLOCK], ids=["recurrent_ssd", "mamba2_step"])


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture(scope="module")
def both():
    """They take CPU tensors as if they were CUDA's, and find no kernel."""
    if (reason := cubin.why_not_native()) is not None:
        pytest.skip(reason)
    return natives(lambda *_: NO_KERNEL)


@pytest.fixture
def direct(both, monkeypatch):
    """What each attempt to go around the dispatcher was answered."""
    answers = []

    def note(run, *arguments):
        answers.append(run(*arguments))
        return answers[-1]

    for module, native in zip((cuda_recurrent, cuda_mamba2), both, strict=True):
        monkeypatch.setattr(module, "direct", lambda run=native.direct: partial(note, run))
    return answers


def call(case, **changes):
    return case.function()(**case.inputs("cpu") | changes)


@BOTH
def test_a_plain_call_goes_around(direct, case):
    call(case)
    assert direct == [NO_KERNEL]


@BOTH
def test_so_does_a_parameter_without_gradients(direct, case):
    with torch.no_grad():
        call(case, d=torch.nn.Parameter(case.inputs("cpu")["d"]))
    assert direct == [NO_KERNEL]


@BOTH
@pytest.mark.parametrize("name", ["dt", "a", "d", "dt_bias"])
def test_what_wants_a_gradient_does_not(direct, case, name):
    call(case, **{name: case.inputs("cpu")[name].requires_grad_()})
    assert direct == [UNSEEN]


@BOTH
def test_a_subclass_does_not(direct, case):
    call(case, dt=case.inputs("cpu")["dt"].as_subclass(Subclass))
    assert direct == [UNSEEN]


@BOTH
def test_a_mode_sees_the_op(direct, case):
    with Recording() as mode:
        call(case)
    assert direct == []
    assert any(case.function().__name__ in name for name in mode.names)


@BOTH
def test_a_compiler_sees_the_op(direct, case):
    compiled = torch.compile(lambda **x: case.function()(**x), fullgraph=True, backend="aot_eager")
    compiled(**case.inputs("cpu"))
    assert direct == []


@BOTH
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_a_named_other_backend_does_not(direct, case, backend):
    try:
        call(case, backend=backend)
    except NotImplementedError:
        assert backend == "composed"
    assert direct == []


@BOTH
def test_wrong_input_gets_its_own_message(direct, case):
    with pytest.raises(ValueError, match=r"dt must have shape \[2, 1, .*\], got \[2, 3\]"):
        call(case, dt=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"dt_limit must be \(least, greatest\), got \(2, 1\)"):
        call(case, dt_limit=(2, 1))
    assert direct == [WRONG_SHAPES, "dt_limit is not (least, greatest)"]


@BOTH
def test_limits_may_be_a_list_of_integers(direct, case):
    call(case, dt_limit=[0, 1])
    assert direct == [NO_KERNEL]


@BOTH
def test_what_is_no_bool_is_left_to_the_op(direct, case):
    call(case, dt_softplus=1)
    assert [answer.endswith("is no bool") for answer in direct] == [True]
    with pytest.raises(RuntimeError, match="dt_softplus"):
        call(case, dt_softplus="yes")


def test_whether_a_state_is_settled_is_a_bool(direct):
    call(BLOCK, settled_state=1)
    call(BLOCK, settled_state=True)
    assert direct == ["dt_softplus, norm_before_gate or settled_state is no bool", NO_KERNEL]


def test_the_native_functions_count_their_arguments(both):
    for native, wanted in zip(both, (11, 20), strict=True):
        with pytest.raises(TypeError, match=f"{wanted} arguments are expected"):
            native.direct(*range(wanted - 1))


def test_the_native_functions_outlive_what_made_them(both):
    case = STEP.tensors(STEP.inputs("cpu"))
    direct = natives(lambda *_: NO_KERNEL)[0].direct
    assert direct(*case, True, None) == NO_KERNEL


def test_wrong_options_of_a_block_get_their_own_message(direct):
    with pytest.raises(RuntimeError, match="eps"):
        call(BLOCK, eps="small")
    with pytest.raises(ValueError, match="the heads of z must be a multiple of x_heads, got the heads of z 4 and x_"):
        call(BLOCK, x_heads=3)
    assert direct == ["eps is no number", WRONG_SHAPES]


@pytest.mark.usefixtures("without_nvrtc")
def test_without_nvrtc_only_what_is_packaged_runs():
    assert cuda_recurrent._load(None, 0, "bf16", "fp32", 176, 64, 1) == "NVRTC is not installed"
    kind = ("bf16", "bf16", "bf16", "fp32", 176, 4, 256, 1)
    assert cuda_mamba2._load(None, 0, *kind, 0, 1) == "NVRTC is not installed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"x": x["x"].float()}, "x, b and c are not of one dtype"),
        (lambda x: {"state": x["state"].double()}, "the state is not float32 or bfloat16"),
        (lambda x: {"dt": x["dt"].int()}, "dt, a, d or dt_bias is of no floating dtype"),
        (lambda x: {"d": x["d"].int()}, "dt, a, d or dt_bias is of no floating dtype"),
        (lambda x: {"b": strided(x["b"])}, "the last dim of b is not contiguous"),
        (lambda x: {"c": shifted(x["c"])}, "the last dim of c is not contiguous, or"),
        (lambda x: {"state": torch.zeros(2, 4, 32, 16).mT}, "the states of heads are not contiguous"),
        (lambda x: {"state": x["state"][:1]}, WRONG_SHAPES),
        (lambda x: {"state_indices": torch.zeros(2, dtype=torch.int16)}, "state_indices are not int32 or int64"),
        (lambda x: {"state_indices": torch.zeros(3, dtype=torch.int32)}, WRONG_SHAPES),
    ],
)
def test_reasons_of_the_step(both, change, reason):
    x = STEP.inputs("cpu")
    assert both[0].why_not(STEP.tensors(x | change(x))).startswith(reason)


@pytest.mark.parametrize(
    ("K", "V", "reason"), [(24, 64, "K is 24"), (272, 64, "K is 272"), (64, 24, "V is 24"), (64, 0, "V is 0")]
)
def test_reasons_of_widths(both, K, V, reason):
    case = Case(K, V, B=1, H=1, shared=(1, 1, 1), index=None)
    assert both[0].why_not(case.tensors(case.inputs("cpu"))).startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: {"xbc": x["xbc"].float()}, "z and xbc are not of one dtype"),
        (lambda x: {"norm_weight": x["norm_weight"].float()}, "conv_weight, conv_bias and norm_weight are not of one"),
        (lambda x: {"conv_state": x["conv_state"].double()}, "conv_state is not bfloat16, float16 or float32"),
        (lambda x: {"a": x["a"].long()}, "dt, a, d or dt_bias is of no floating dtype"),
        (lambda x: {"z": strided(x["z"])}, "the last dim of z or of xbc is not contiguous"),
        (lambda x: {"conv_weight": strided(x["conv_weight"])}, "conv_weight, conv_bias or norm_weight is not conti"),
        (lambda x: {"conv_weight": shifted(x["conv_weight"])}, "conv_weight or conv_state does not start at a"),
        (lambda x: {"conv_state": x["conv_state"].mT.contiguous().mT}, "the rows of conv_state are not contiguous"),
        (lambda x: {"conv_state": x["conv_state"][:1]}, WRONG_SHAPES),
        (lambda x: {"norm_weight": x["norm_weight"].view(8, 8)}, WRONG_SHAPES),
        (lambda x: {"d_state": 48}, WRONG_SHAPES),
        (lambda x: {"x_heads": 0}, WRONG_SHAPES),
    ],
)
def test_reasons_of_the_block(both, change, reason):
    x = BLOCK.inputs("cpu")
    changed = x | change(x)
    dims = tuple(changed[name] for name in ("d_state", "x_heads", "b_heads"))
    assert both[1].why_not(BLOCK.tensors(changed), dims).startswith(reason)


def test_a_block_of_too_many_heads_says_so(both):
    """1021 is a prime, and one norm has them all: they do not spread over the blocks of a cluster."""
    case = Mamba2Case(32, 16, B=1, H=1021, shared=(1021, 1, 1), index=None)
    reason = both[1].why_not(case.tensors(case.inputs("cpu")), (32, 1021, 1))
    assert reason.startswith("more heads share channels or a norm than a cluster")
