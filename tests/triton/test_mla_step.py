"""A decode step of latent attention in Triton against float64, as near as the composition of PyTorch's operators."""

from dataclasses import replace

import pytest
import torch

from hylo_ops.fused import mla_step
from tests.ops.mla_step_cases import BF16, EMULATED, FP16, FP32, SCALE, Case, by_triton, run_and_check

CASES = [
    *EMULATED,
    Case(6, 2, 20, 32, 16, 40, (30, 1, 17), dtype=FP32, angles=FP32, padding=(2,)),  # nothing rounded, odd widths
    Case(8, 1, 16, 48, 16, 80, tuple(range(1, 20)), page=4, spare=2),  # more than a tile of rows and of columns
    Case(5, 5, 16, 16, 16, 16, (9, 3), page=None, scales=5, dtype=FP16, integers=torch.int64),
    Case(12, 4, 32, 48, 32, 32, (9, 70), scales=4, padding=(0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case):
    run_and_check(case, "cpu", by_triton)


def test_dtypes_may_differ():
    """A cache of 16 bits under queries of 32, and weights the other way round."""
    case = Case(6, 2, 32, 80, 32, 48, dtype=FP32, angles=FP32)
    x = case.inputs("cpu")
    mixed = x | {"kv_cache": x["kv_cache"].to(BF16), "w_uk": x["w_uk"].to(FP16), "w_uv": x["w_uv"].to(BF16)}
    other = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in mixed.items()}
    o, expected = by_triton(mixed), mla_step(**other, scale=SCALE, backend="reference")
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed["kv_cache"].nan_to_num(7.0), other["kv_cache"].nan_to_num(7.0))


@pytest.mark.parametrize("page", [None, 16])
def test_a_position_beyond_the_cache_is_not_written(page):
    """As the CUDA kernels have it; the tokens that the cache holds are attended to."""
    x = replace(EMULATED[0], lengths=(32, 5), page=page, padding=()).inputs("cpu")
    before = x["kv_cache"].clone()
    x["position"][0] = 32
    x["cache_seqlens"][0] = 31
    o = by_triton(x)
    changed = (x["kv_cache"].nan_to_num(1e9) != before.nan_to_num(1e9)).any(-1)
    assert int(changed.sum()) == 1
    assert torch.isfinite(o).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"R": 24}, "R is 24, not a multiple of 16 up to 576"),
        ({"E": 8}, "E is 8, not a multiple of 16 up to 128"),
        ({"nope": 272}, "q_nope is 272 wide, more than 256"),
        ({"dtype": torch.float64}, "q_nope is torch.float64, not bfloat16, float16 or float32"),
    ],
)
def test_what_it_refuses(change, reason):
    x = replace(Case(4, 2, 16, 32, 16, 16, (5,), dtype=FP32, angles=FP32), **change).inputs("cpu")
    with pytest.raises(NotImplementedError, match=f"triton: {reason}"):
        by_triton(x)


def test_the_last_dim_must_be_contiguous():
    x = EMULATED[0].inputs("cpu")
    x["w_uv"] = x["w_uv"].mT.contiguous().mT
    with pytest.raises(NotImplementedError, match="the last dim of w_uv is not contiguous"):
        by_triton(x)
