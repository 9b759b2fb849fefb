"""The model on a GPU: the same numbers as on a CPU, the fused decode step in place, the true 1B dims."""

import copy

import pytest
import torch

from hylo_ops.testing import within_budget
from tests.test_model import make_model, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generates_what_the_cpu_generates(layout, implementation):
    model = make_model(layout)
    ids = tokens(2, 9)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": implementation}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    on_gpu, ids = copy.deepcopy(model).cuda(), ids.cuda()
    found = on_gpu.generate(ids, attention_mask=torch.ones_like(ids), **settings, disable_compile=True)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_cpu(dtype):
    """Against float64 logits, at most twice the error of the same model in the same type on the CPU."""
    model = make_model("gdn")
    expected = model(tokens(), use_cache=False).logits

    def logits(device):
        return copy.deepcopy(model).to(device, dtype)(tokens().to(device), use_cache=False).logits.cpu()

    within_budget(logits("cuda"), logits("cpu"), expected)
