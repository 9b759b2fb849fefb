"""The convolution of x within the scan's kernel, against float64 and against one op after the other, on a GPU."""

from functools import partial

import pytest
import torch

from hylo_ops.fused import convolved_ssd
from hylo_ops.ssd import cuda_chunk
from hylo_ops.testing import cast, gradients, relative_error
from tests.ops.convolved_ssd_cases import CASES, Case, mix_and_check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MORE = 1.05  # of an error is as good: two sums of the same numbers in another order
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def call(backend, dims, xbc, weight, bias, dt, a, **others):
    options = {"dt_softplus": True, "dt_limit": None, "cu_seqlens": None}
    return convolved_ssd.convolved_ssd(xbc, weight, bias, dt, a, dims, **options | others, backend=backend)


def no_further(found, composed, exact, name):
    ours, theirs = relative_error(found, exact), relative_error(composed, exact)
    assert ours <= MORE * theirs + 1e-6, f"{name}: {ours:.3e}, one after the other {theirs:.3e}"


@by_case
def test_results(case):
    inputs = case.inputs("cuda")
    found, again, composed = (call(name, case.dims, **inputs) for name in ("cuda", "cuda", "composed"))
    exact = call("reference", case.dims, **cast(inputs, torch.float64))
    for i, name in enumerate(("o", "final_state", "last_inputs")):
        no_further(found[i], composed[i], exact[i], name)
        assert torch.equal(found[i], again[i]), name
    assert torch.equal(found[2], composed[2])


@by_case
def test_gradients(case):
    inputs = case.inputs("cuda")
    wanted = [name for name, tensor in inputs.items() if tensor is not None]
    found, again, composed = (
        gradients(partial(call, name, case.dims), inputs, wanted, torch.bfloat16)
        for name in ("cuda", "cuda", "composed")
    )
    exact = gradients(partial(call, "reference", case.dims), cast(inputs, torch.float64), wanted, torch.bfloat16)
    for name in wanted:
        no_further(found[name], composed[name], exact[name], name)
        assert torch.equal(found[name], again[name]), name


@by_case
def test_b_and_c_alone(case):
    mix_and_check(case, "cuda")


def test_what_is_fused_by_itself(monkeypatch):
    """Where it saves time, and nowhere else."""
    launched = []
    begin_mixed = cuda_chunk._Call.begin_mixed
    monkeypatch.setattr(cuda_chunk._Call, "begin_mixed", lambda *args: launched.append(1) or begin_mixed(*args))

    def launches(case, **others):
        launched.clear()
        call(None, case.dims, **case.inputs("cuda") | others)
        return len(launched)

    assert launches(CASES[0]) == 1
    assert launches(Case("shared-x", 1, 2061, "hylo", 64, 64, 4)) == 0
    assert launches(Case("short", 1, 200, "mamba2", 64, 128, 4)) == 0
    assert launches(Case("fp32", 1, 2061, "mamba2", 64, 128, 4, dtype=torch.float32)) == 0
    state = torch.zeros(1, 512, 4, device="cuda", dtype=torch.bfloat16)
    assert launches(CASES[0], conv_state=state) == 0
    assert launches(CASES[0], cu_seqlens=torch.tensor([0, 2061], device="cuda", dtype=torch.int32)) == 0


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("shared-x", 1, 2061, "hylo", 64, 64, 4), "x has less than half of the 768 channels"),
        (Case("few-channels", 1, 2061, "equal", 64, 64, 4), "x has less than half of the 384 channels"),
        (Case("short", 1, 200, "mamba2", 64, 128, 4), "no sequence is cut"),
        (Case("wide-state", 1, 2061, "mamba2", 256, 256, 4), "K is 256, more than 128"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_is_refused(case, message):
    with pytest.raises(NotImplementedError, match=message):
        call("cuda", case.dims, **case.inputs("cuda"))
