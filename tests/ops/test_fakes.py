"""What the fakes promise of gradients is what the backwards give, strides too, whatever the inputs' strides are."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hylo_ops  # noqa: F401 - registers the ops

B, T, H, K, V, D = 2, 5, 4, 3, 6, 8


def strided(*shape):
    """Every second number of rows that lie further apart, dims in another order."""
    generator = torch.Generator().manual_seed(len(shape))
    wide = torch.rand(*reversed(shape), 2, generator=generator)
    return wide[..., 0].permute(*reversed(range(len(shape))))


NO_STATES = torch.empty(0)


def chunk_ssd():
    inputs = [strided(B, T, 2, V), strided(B, T, H), -strided(H), strided(B, T, 2, K), strided(B, T, H, K)]
    vectors = [strided(H), strided(H), strided(B, H, V, K)]
    grads = [strided(B, T, H, V), strided(B, H, V, K)]
    return [grads, [NO_STATES]], [*inputs, *vectors, None, True, None, False, True]


def convolved_ssd():
    channels = 2 * V + 2 * K + H * K
    xbc, states = strided(B, T, channels), [strided(B, channels, 4), strided(B, H, V, K)]
    vectors = [strided(B, T, H), -strided(H), strided(H), strided(H)]
    grads = [strided(B, T, H, V), strided(B, H, V, K), strided(B, channels, 4)]
    inputs = [xbc, strided(channels, 4), strided(channels), *vectors, *states, None, V, K, 2, 2, True, None, True]
    return [grads, [strided(B, T, channels).contiguous(), NO_STATES]], inputs


def causal_conv1d():
    inputs = [strided(B, T, D), strided(D, 4), strided(D), strided(B, D, 4), None, "silu"]
    return [[strided(B, T, D), strided(B, D, 4)]], inputs


def gated_rms_norm():
    return [[strided(B, T, H, V)]], [strided(B, T, H, V), strided(B, T, H, V), strided(H, V), 1e-5, False]


def swiglu():
    return [[strided(B, T, D)]], [strided(B, T, 2 * D)]


def l2_norm():
    return [[strided(B, T, H, K)], [strided(B, T, H)]], [strided(B, T, H, K), 1e-6]


def chunk_gated_delta_rule():
    keys, gates = [strided(B, T, 2, K), strided(B, T, 2, K)], [-strided(B, T, H), strided(B, T, H)]
    inputs = [*keys, strided(B, T, H, V), *gates, strided(B, H, K, V)]
    return [[strided(B, T, H, V), strided(B, H, K, V)]], [*inputs, None, 0.5, False]


CASES = [chunk_ssd, convolved_ssd, causal_conv1d, gated_rms_norm, chunk_gated_delta_rule, swiglu, l2_norm]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_the_fakes_say(case):
    backward = getattr(torch.ops.hylo_ops, f"{case.__name__}_backward")
    given, inputs = case()
    found = backward(*given, *inputs, "reference")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs]
        promised = backward(*([mode.from_tensor(t) for t in tensors] for tensors in given), *fakes, "reference")

    def look(tensors):
        return [(t.shape, t.stride(), t.dtype) for t in tensors]

    assert look(promised) == look(found)
    assert all(t.is_contiguous() for t in found)
    assert len(found) == sum(isinstance(t, torch.Tensor) for t in inputs)
