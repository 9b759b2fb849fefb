"""The CUDA products of few rows on a GPU: against float64, behind kernels that write what they read, in graphs."""

from functools import partial

import pytest
import torch

from hylo_ops.skinny_linear import cuda
from tests.csrc.skinny_linear_cases import BF16, EMULATED, FP16, WHOLE, Case, run_and_check
from tests.ops.step_chains import check_runs

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CLUSTERS = [Case(2048, 8192, 9, cluster=cluster, dtype=FP16) for cluster in range(1, 9)]
MANY_ROWS = [Case(2048, 2048, B, swiglu=True) for B in (15, 16, 17, 31, 32, 33, 63)]


def forward_from(source):
    def forward(x, weight, residual, swiglu, constant, spread, norm, eps, conv_weight, conv_state, silu):
        conv = {"conv_weight": conv_weight, "conv_state": conv_state, "silu": silu}
        options = {"norm": norm, "eps": eps, **conv, "spread": spread, "cubin_source": source}
        return cuda.forward(x, weight, residual, swiglu, constant, **options)

    return forward


def test_a_cpu_tensor_is_refused_with_the_reason():
    x = torch.zeros(1, 64, dtype=BF16)
    assert cuda.why_not(x, x, None, False) == "x is on cpu, not on a CUDA device"


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("case", [*EMULATED, *WHOLE, *CLUSTERS, *MANY_ROWS], ids=lambda case: case.name)
    def test_agrees_with_float64(self, case):
        run_and_check(case, "cuda", forward_from(None))

    @pytest.mark.parametrize("source", ["packaged", "nvrtc"])
    def test_agrees_from_either_source(self, source):
        run_and_check(EMULATED[3], "cuda", forward_from(source))

    @pytest.mark.parametrize("B", [1, 40])
    def test_waits_for_what_kernels_ahead_write(self, B):
        """Each product's x, or residual, is what the one ahead gives; in a graph, again and again the same bits."""
        D, wide, layers = 2048, 8192, 12
        normal = partial(torch.randn, device="cuda", dtype=BF16)
        up = [normal(2 * wide, D) / D**0.5 for _ in range(layers)]
        down = [normal(D, wide) / wide**0.5 / 8 for _ in range(layers)]  # what SwiGLU squares must not grow
        x, stream = normal(B, D), normal(B, D)

        def run(multiply):
            stream.copy_(x)
            for to_wide, to_narrow in zip(up, down, strict=True):
                inner = multiply(stream, to_wide, None, True)
                multiply(inner, to_narrow, stream, False)
            return [stream.clone()]

        def one_by_one(*inputs):
            y = cuda.forward(*inputs, False)
            torch.cuda.synchronize()
            return y

        def at_once(*inputs):
            return cuda.forward(*inputs, True)

        check_runs(partial(run, one_by_one), partial(run, at_once))

    def test_waits_for_weights_that_are_not_constant(self):
        x = torch.randn(4, 2048, device="cuda", dtype=BF16)
        weights = [torch.randn(4096, 2048, device="cuda", dtype=BF16) for _ in range(2)]
        expected = [cuda.forward(x, weight, None, False, True) for weight in weights]
        now = torch.empty_like(weights[0])
        for i in range(100):
            now.copy_(weights[i % 2])
            assert torch.equal(cuda.forward(x, now, None, False, False), expected[i % 2])
