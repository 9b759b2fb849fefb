"""Which decode steps of the convolution skip torch's dispatcher, and which do not."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_ops import recurrent_causal_conv1d

OP = "hylo_ops::recurrent_causal_conv1d"


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def tensors(**changes):
    inputs = {"x": torch.ones(2, 1, 8), "weight": torch.ones(8, 4), "bias": torch.ones(8), "state": torch.ones(2, 8, 4)}
    return inputs | changes


def is_dispatched(inputs):
    """A profiler sees what goes through the dispatcher."""
    with torch.autograd.profiler.profile() as profile:
        recurrent_causal_conv1d(**inputs)
    return OP in [event.name for event in profile.function_events]


def test_a_plain_call_goes_around():
    inputs = tensors()
    assert not is_dispatched(inputs)
    through_the_op = tensors()
    y = torch.ops.hylo_ops.recurrent_causal_conv1d(*through_the_op.values(), None, None, None)
    assert torch.equal(inputs["state"], through_the_op["state"])
    assert torch.equal(recurrent_causal_conv1d(**tensors()), y)


def test_so_does_a_parameter_without_gradients():
    with torch.no_grad():
        assert not is_dispatched(tensors(weight=torch.nn.Parameter(torch.ones(8, 4))))


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_what_wants_a_gradient_does_not(name):
    inputs = tensors()
    assert is_dispatched(inputs | {name: inputs[name].requires_grad_()})


def test_a_subclass_does_not():
    assert is_dispatched(tensors(x=torch.ones(2, 1, 8).as_subclass(Subclass)))


def test_a_mode_sees_the_op():
    with Recording() as mode:
        recurrent_causal_conv1d(**tensors())
    assert OP in mode.names


def test_a_compiler_sees_the_op():
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch.compile(lambda **x: recurrent_causal_conv1d(**x), fullgraph=True, backend=backend)(**tensors())
    assert "recurrent_causal_conv1d" in graphs[0]
    assert "hylo_ops" in graphs[0]
