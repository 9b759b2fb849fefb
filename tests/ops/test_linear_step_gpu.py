"""fused.linear_step on a GPU: against float64, who takes what, chains whose kernels begin early, graphs."""

from functools import partial

import pytest
import torch

from hylo_ops.fused import linear_step
from hylo_ops.testing import cast, within_budget
from tests.ops.step_chains import check_chain, check_one_state
from tests.ops.test_linear_step import FORMS, make, one_by_one, ours

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
SIZES = [{"B": B, "K": 2048, "N": 9232, "D": 6144} for B in (1, 16, 33, 64)]


@pytest.mark.parametrize("backend", ["cuda", "composed"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_float64(sizes, form, backend):
    x = make(form, **sizes, dtype=BF16, device="cuda")
    results = ours(x, backend=backend), one_by_one(x), one_by_one(cast(x, torch.float64))
    for got, theirs, want in zip(*results, strict=True):
        within_budget(got, theirs, want)


@pytest.mark.parametrize(
    ("change", "fastest"),
    [
        ({"dtype": BF16}, "cuda"),
        ({"dtype": FP16, "form": "conv"}, "cuda"),
        ({"dtype": FP16}, "composed"),
        ({"dtype": BF16, "W": 3}, "composed"),
    ],
    ids=str,
)
def test_without_a_name_the_fastest_that_takes_it(change, fastest):
    x = make(**SIZES[1] | change, device="cuda")
    for got, want in zip(ours(x), ours(x, backend=fastest), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("B", [1, 40])
def test_waits_for_what_kernels_ahead_write(B, constant):
    """Its x is what the kernel ahead gives."""
    D, N, layers = 1024, 1536, 8
    normal = partial(torch.randn, device="cuda", dtype=BF16)
    weight, conv_weight = normal(D, N) / N**0.5, normal(D, 4) / 2
    options = {"norm_weight": normal(N), "conv_weight": conv_weight, "activation": "silu", "backend": "cuda"}

    def step(projected, layer, constant):
        return linear_step(projected, weight, conv_state=layer["conv"], constant_weight=constant, **options)

    weights = [normal(N, D) / D**0.5 for _ in range(layers)]
    check_chain(step, normal(B, 1, D), weights, [{"conv": normal(B, D, 4)} for _ in range(layers)], constant)


def test_a_state_that_the_kernel_ahead_writes_is_read_after_it():
    x = make(**SIZES[0], dtype=BF16, device="cuda")
    check_one_state(lambda: linear_step(**x, constant_weight=True, backend="cuda"), [x["conv_state"]])
