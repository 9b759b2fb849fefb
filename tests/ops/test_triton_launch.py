"""What a cached launch of a Triton kernel looks at: all that Triton compiles another kernel for."""

import pytest
import torch

from hylo_ops import recurrent_causal_conv1d

triton_launch = pytest.importorskip("hylo_ops.common.triton_launch", reason="triton is not installed")

ALIGNED = torch.zeros(32)
GRID = (3, 1, 1)


class Kernel:
    """Notes what it is compiled for and launched with."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps, launch_pdl=False):
            self.compiled.append(arguments)
            self.launched.append((grid, *arguments))
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, *arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_launch, "_ALWAYS_BIND", False)
    return Kernel()


def launch(kernel, tensor=ALIGNED, second=None, number=32, constant=True, num_warps=4, early=False):
    numbers = number, (number, 5)
    triton_launch.launch(kernel, GRID, (tensor, second), numbers, (constant,), num_warps, early=early)


def test_the_second_launch_is_not_bound(kernel):
    again = torch.zeros(32)
    launch(kernel)
    launch(kernel, again, number=64)
    assert len(kernel.compiled) == 1
    assert kernel.launched[1] == (GRID, again, None, 64, (64, 5), True)


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": ALIGNED.half()},
        {"tensor": ALIGNED[1:]},
        {"second": ALIGNED},
        {"number": 1},
        {"number": 33},
        {"number": 2**31},
        {"number": 32.0},
        {"constant": False},
        {"num_warps": 8},
        {"early": True},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_told_apart(kernel, change):
    launch(kernel)
    launch(kernel, **change)
    launch(kernel, **change)
    assert len(kernel.compiled) == 2


def test_kernels_do_not_share(kernel):
    launch(kernel)
    launch(other := Kernel())
    assert (len(kernel.compiled), len(other.compiled)) == (1, 1)


@pytest.mark.parametrize(("a", "b"), [(0, 3), (1, 3), (3, 3), (4, 3)])
def test_host_arithmetic(a, b):
    triton = pytest.importorskip("triton")
    assert triton_launch.ceil_div(a, b) == triton.cdiv(a, b)
    assert triton_launch.next_power_of_2(a + 1) == triton.next_power_of_2(a + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("D", [1, 128, 130])
def test_cached_launches_compute_the_same(D, B, offset):
    """Twice each, so that the second goes by the cache; aligned or not, sizes of 1, of 16 and of neither."""
    for seed in range(2):
        torch.manual_seed(seed)
        x = torch.randn(B * D + offset, device="cuda")[offset:].view(B, 1, D)
        weight, bias = torch.randn(D, 4, device="cuda"), torch.randn(D, device="cuda")
        states = [torch.ones(B, D, 4, device="cuda") for _ in range(2)]
        found, expected = (
            recurrent_causal_conv1d(x, weight, bias, state, activation="silu", backend=backend)
            for state, backend in zip(states, ("triton", "reference"), strict=True)
        )
        torch.testing.assert_close(found, expected)
        assert torch.equal(*states)
