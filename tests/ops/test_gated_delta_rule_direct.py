"""Which calls of the decode step skip torch's dispatcher, and which do not: compilers, modes, transforms, gradients."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_ops import cubin, recurrent_gated_delta_rule
from hylo_ops.gated_delta_rule import cuda_recurrent
from tests.ops.gated_delta_rule_step_cases import Case
from tests.ops.layouts import strided

CPU = 1  # DLPack's number
NO_KERNEL = "there is no kernel in this test"
UNSEEN = "a tensor has no memory to be seen"
CASE = Case(64, 64, B=2, index=None)


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def native():
    """It takes CPU tensors as if they were CUDA's, and finds no kernel."""
    if (reason := cubin.why_not_native()) is not None:
        pytest.skip(reason)
    return cubin.native().GatedDeltaRuleStep(torch, lambda *kind: NO_KERNEL, device_type=CPU)


@pytest.fixture
def direct(native, monkeypatch):
    """What each attempt to go around the dispatcher was answered."""
    answers = []

    class Noting:
        def run(self, *arguments):
            answers.append(native.run(*arguments))
            return answers[-1]

    monkeypatch.setattr(cuda_recurrent, "_native_or_none", Noting)
    return answers


def tensors(**changes):
    inputs = CASE.inputs("cpu") | changes
    inputs.pop("scale")
    return inputs


def test_a_plain_call_goes_around(direct):
    recurrent_gated_delta_rule(**tensors())
    assert direct == [NO_KERNEL]


def test_so_does_a_parameter_without_gradients(direct):
    parameter = torch.nn.Parameter(tensors()["beta"])
    with torch.no_grad():
        recurrent_gated_delta_rule(**tensors(beta=parameter))
    assert direct == [NO_KERNEL]


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_what_wants_a_gradient_does_not(direct, name):
    wanting = {name: tensors()[name].requires_grad_()}
    recurrent_gated_delta_rule(**tensors(**wanting))
    assert direct == [UNSEEN]


def test_a_subclass_does_not(direct):
    recurrent_gated_delta_rule(**tensors(q=tensors()["q"].as_subclass(Subclass)))
    assert direct == [UNSEEN]


def test_a_subclass_that_reaches_the_backend_is_seen(native):
    x = tensors(q=tensors()["q"].as_subclass(Subclass))
    assert native.why_not((*x.values(), None, None, None)) == NO_KERNEL


def test_a_transform_sees_the_op(direct):
    call = torch.func.functionalize(lambda q: recurrent_gated_delta_rule(**tensors(q=q)))
    with pytest.raises(RuntimeError, match=r"Found a custom .* operator"):  # the dispatcher's: it has the op
        call(tensors()["q"])
    assert direct == []


def test_a_mode_sees_the_op(direct):
    with Recording() as mode:
        recurrent_gated_delta_rule(**tensors())
    assert direct == []
    assert any("recurrent_gated_delta_rule" in name for name in mode.names)


def test_fake_tensors_do_not(direct):
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) for name, t in tensors().items()}
        assert recurrent_gated_delta_rule(**fakes).shape == fakes["v"].shape
    recurrent_gated_delta_rule(**fakes)
    assert direct in ([], [UNSEEN])


def test_a_compiler_sees_the_op(direct):
    x = tensors()
    compiled = torch.compile(lambda **x: recurrent_gated_delta_rule(**x), fullgraph=True, backend="aot_eager")
    compiled(**x)
    assert direct == []


def test_a_tracer_sees_the_op(direct):
    x = tensors()
    traced = torch.jit.trace(lambda *t: recurrent_gated_delta_rule(*t), tuple(x.values()), check_trace=False)
    assert "recurrent_gated_delta_rule" in str(traced.graph)
    assert direct == []


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_named_other_backend_does_not(direct, backend):
    try:
        recurrent_gated_delta_rule(**tensors(), backend=backend)
    except NotImplementedError:
        assert backend == "triton"
    assert direct == []


def test_wrong_input_gets_its_own_message(direct):
    with pytest.raises(ValueError, match=r"beta must have shape \[2, 1, 4\], got \[2, 1, 3\]"):
        recurrent_gated_delta_rule(**tensors(beta=torch.zeros(2, 1, 3)))
    assert direct == ["the shapes are not the op's"]


@pytest.mark.usefixtures("without_nvrtc")
def test_without_nvrtc_only_what_is_packaged_runs():
    assert cuda_recurrent._load(None, 0, "bf16", "fp32", 176, False, 64) == "NVRTC is not installed"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"q": torch.zeros(2, 1, 2, 24), "k": torch.zeros(2, 1, 2, 24), "state": torch.zeros(2, 4, 24, 64)},
            "q, k and v",
        ),
        ({"state": torch.zeros(2, 4, 64, 64, dtype=torch.float64)}, "the state is not float32 or bfloat16"),
        ({"g": torch.zeros(2, 1, 4, dtype=torch.int32)}, "a gate is of no floating dtype"),
        ({"q": strided(torch.zeros(2, 1, 2, 64).bfloat16())}, "the last dim of q is not contiguous"),
        (
            {"v": torch.zeros(2 * 4 * 64 + 1).bfloat16()[1:].view(2, 1, 4, 64)},
            "the last dim of v is not contiguous, or",
        ),
        ({"state": torch.zeros(2, 4, 64, 64).mT}, "the states of heads are not contiguous"),
        ({"k": torch.zeros(2, 1, 2, 64)}, "q, k and v are not of one dtype"),
    ],
)
def test_reasons(native, change, reason):
    x = tensors(**change)
    assert native.why_not((*x.values(), None, None, None)).startswith(reason)


@pytest.mark.parametrize(
    ("K", "V", "reason"), [(24, 64, "K is 24"), (272, 64, "K is 272"), (64, 24, "V is 24"), (64, 0, "V is 0")]
)
def test_reasons_of_widths(native, K, V, reason):
    x = (torch.zeros(1, 1, 1, K), torch.zeros(1, 1, 1, K), torch.zeros(1, 1, 1, V), torch.zeros(1, 1, 1))
    assert native.why_not((*x, x[3], torch.zeros(1, 1, K, V), None, None, None)).startswith(reason)
