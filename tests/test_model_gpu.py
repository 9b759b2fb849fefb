"""The model on a GPU: the same numbers as on a CPU, the fused decode step in place, the true 1B dims."""

import copy

import pytest
import torch

from hylo.distill.recomputing import recompute_layers
from hylo.mixers import packing
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


@pytest.mark.parametrize("checkpointing", [False, True, "selective"], ids=["kept", "recomputed", "selective"])
@pytest.mark.parametrize("layout", ["gdn", "mamba2", "mla"])
def test_a_step_at_once_errs_no_more_than_layer_by_layer(monkeypatch, layout, checkpointing):
    """Gradients under autocast against float64: one product each way against a product for each layer."""
    exact = make_model(layout).train()
    model = copy.deepcopy(exact).float().cuda()
    if checkpointing:
        recompute_layers(model, keep_attention=checkpointing == "selective")

    def gradients(model, half=True):
        device = model.device
        model.zero_grad()
        ids = tokens(2, 96).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert all(parameter.grad.dtype == parameter.dtype for parameter in model.parameters())
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()

    expected, found = gradients(exact, half=False), gradients(model)
    monkeypatch.setattr(packing, "_is_plain", lambda _: False)
    within_budget(found.bfloat16(), gradients(model).bfloat16(), expected)


def test_weights_gradients_are_the_products_own_sums():
    """In fp32 and not by way of 16 bits."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, n, bias=False, device="cuda") for n in (40, 24, 3)]
    x, towards = torch.randn(2, 300, 64, device="cuda"), torch.randn(2, 300, 67, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        (y,) = packing.project(x, layers)
    y.backward(towards)
    found = torch.cat([layer.weight.grad for layer in layers]).double()
    exact = towards.flatten(0, 1).double().T @ x.flatten(0, 1).bfloat16().double()
    assert (found - exact).norm() < 1e-5 * exact.norm()
