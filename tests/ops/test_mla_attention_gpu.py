"""mla_attention on a GPU: whose kernels run, against float64 with gradients, what is copied, what nothing takes."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hylo_ops import mla_attention
from hylo_ops.testing import cast, gradients, relative_error, within_budget
from tests.ops.test_mla_attention import NAMES, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16 = torch.bfloat16, torch.float16
DIMS = {
    "1b": {"H": 32, "HK": 8, "K": 64, "V": 64},
    "3b": {"H": 24, "HK": 8, "K": 128, "V": 128},
    "qwen": {"H": 16, "HK": 8, "K": 128, "V": 128},
    "unequal-grouped": {"H": 16, "HK": 8, "K": 96, "V": 64},
    "minicpm": {"H": 40, "HK": 40, "K": 96, "V": 64},
    "deepseek": {"H": 16, "HK": 16, "K": 192, "V": 128},
}
# What the kernels of a forward and of a backward have in their names.
KERNELS = {
    "cudnn": ("cudnn", "cudnn"),
    "flash": ("flash_fwd", "flash_bwd"),
    "efficient": ("fmha_cutlassF", "fmha_cutlassB"),
}


def drawn(name, dtype=BF16, T=300, B=2):
    x = make(B=B, T=T, dtype=torch.float32, **DIMS[name])
    return {key: t.to("cuda", dtype) for key, t in x.items()}


def run(q, k, v, backend=None):
    return mla_attention(q, k, v, scale=q.shape[3] ** -0.5, backend=backend)


def eager(q, k, v):
    """PyTorch's operators in the inputs' dtype, the softmax in fp32, as a model would write it."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = (q @ k.mT * q.shape[3] ** -0.5).to(torch.promote_types(q.dtype, torch.float32))
    unseen = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(unseen, -torch.inf).softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def kernels(call):
    """Names of what runs on the device; the first call compiles and is not looked at."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return [event.name for event in found.events()]


def ran(x, backend=None):
    """The one backend whose kernels a forward and a backward launch."""
    leaves = {name: t.detach().requires_grad_() for name, t in x.items()}
    o = run(**leaves, backend=backend)
    forward = kernels(lambda: run(**x, backend=backend))
    backward = kernels(lambda: torch.autograd.grad(o, list(leaves.values()), o.detach(), retain_graph=True))
    found = [
        name
        for name, (of_forward, of_backward) in KERNELS.items()
        if any(of_forward in kernel for kernel in forward) and any(of_backward in kernel for kernel in backward)
    ]
    assert len(found) == 1, f"forward {forward}, backward {backward}"
    return found[0]


@pytest.mark.parametrize("name", DIMS)
def test_cudnn_is_what_runs_on_hopper(name):
    if torch.cuda.get_device_capability() != (9, 0) or torch.backends.cudnn.version() <= 91500:
        pytest.skip("PyTorch prefers cuDNN after 9.15.0 on sm_90")
    assert ran(drawn(name)) == "cudnn"


@pytest.mark.parametrize("backend", KERNELS)
def test_a_named_backend_is_the_one_that_runs(backend):
    assert ran(drawn("1b"), backend) == backend


def test_the_next_one_runs_where_cudnn_refuses():
    """It is not deterministic; fp32 is no type of cuDNN's and flash's; flash takes no two widths."""
    torch.use_deterministic_algorithms(True)
    try:
        assert ran(drawn("1b")) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran(drawn("1b", torch.float32)) == "efficient"
    assert "fmha_cutlassF" in "".join(kernels(lambda: run(**drawn("unequal-grouped", T=1))))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", DIMS)
def test_agrees_with_float64(name, dtype):
    x = drawn(name, dtype)
    exact = run(**cast(x, torch.float64), backend="reference")
    within_budget(run(**x), eager(**x), exact, "o")
    found, theirs = (gradients(function, x, NAMES, BF16) for function in (run, eager))
    exact = gradients(lambda **kw: run(**kw, backend="reference"), cast(x, torch.float64), NAMES, BF16)
    for leaf in NAMES:
        within_budget(found[leaf], theirs[leaf], exact[leaf], f"d{leaf}")


@pytest.mark.parametrize("backend", ["flash", "efficient"])
def test_the_others_agree_with_float64(backend):
    x = drawn("3b")
    found, theirs = gradients(lambda **kw: run(**kw, backend=backend), x, NAMES, BF16), gradients(eager, x, NAMES, BF16)
    exact = gradients(lambda **kw: run(**kw, backend="reference"), cast(x, torch.float64), NAMES, BF16)
    for leaf in NAMES:
        within_budget(found[leaf], theirs[leaf], exact[leaf], f"d{leaf}")


@pytest.mark.parametrize("T", [1, 2, 127, 1025])
@pytest.mark.parametrize("name", ["1b", "unequal-grouped"])
def test_lengths_that_no_tile_divides(name, T):
    x = drawn(name, T=T)
    within_budget(run(**x), eager(**x), run(**cast(x, torch.float64)))


def test_fp32_and_fp64():
    x = drawn("1b", torch.float32)
    exact = run(**cast(x, torch.float64))
    assert exact.dtype == torch.float64
    assert relative_error(run(**x), exact) < 1e-5
    assert not any("cudnn" in k or "flash" in k or "fmha" in k for k in kernels(lambda: run(**cast(x, torch.float64))))


def test_widths_that_no_kernel_has():
    x = drawn("1b")
    x = {name: t[..., : 20 if name == "v" else 12].contiguous() for name, t in x.items()}
    with pytest.raises(NotImplementedError, match=r"300 tokens, keys of 12 and values of 20 in torch.bfloat16 on cuda"):
        run(**x)
    with pytest.raises(NotImplementedError, match=r"keys of 96 and values of 64 .* on flash"):
        run(**drawn("unequal-grouped"), backend="flash")


def test_no_keys_are_copied():
    """With grouped heads a forward takes what it gives and little more; keys and values of all heads would be twice."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    x = drawn("1b", B=1, T=8192)
    run(**x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = run(**x)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * o.nbytes


def test_the_device_is_not_waited_for():
    x = {name: t.requires_grad_() for name, t in drawn("1b").items()}
    torch.autograd.grad(run(**x).sum(), list(x.values()))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(run(**x).sum(), list(x.values()))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiles_without_a_graph_break_and_runs_the_same_kernels():
    x = drawn("1b")
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**x), run(**x))
    attention = [[name for name in kernels(lambda f=f: f(**x)) if "sdpa" in name] for f in (compiled, run)]
    assert attention[0] == attention[1] != []
