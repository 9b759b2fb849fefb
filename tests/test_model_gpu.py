"""The model on a GPU: the same numbers as on a CPU, the fused decode step in place, the true 1B dims."""

import copy

import pytest
import torch

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
def test_half_precision_is_close_to_float64(dtype):
    """The CUDA norm takes part here; rounding of a tiny model's logits stays within a few per cent."""
    model = make_model("gdn")
    expected = model(tokens(), use_cache=False).logits
    found = copy.deepcopy(model).to("cuda", dtype)(tokens().cuda(), use_cache=False).logits
    error = (found.double().cpu() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 0.05
