"""linear_kl on a GPU: against float64 at the models' vocabularies, fp32 products, memory, 64-bit offsets, graphs."""

import pytest
import torch

from hylo_ops import linear_cross_entropy, linear_kl
from hylo_ops.linear_kl import chunked
from hylo_ops.testing import cast, gradients, relative_error, within_budget
from tests.ops.test_linear_kl import LEAVES, make_targets, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16, FP16, FP32, WIDE = torch.bfloat16, torch.float16, torch.float32, torch.float64
LLAMA, QWEN = {"D": 2048, "DT": 4096, "V": 128256}, {"D": 2048, "DT": 4096, "V": 151936}
ODD = {"D": 72, "DT": 40, "V": 5003}  # rows of logits that start anywhere


def make(N, D, DT, V, dtype=BF16, seed=0):
    """Logits of 3 or so, some of 12."""
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = {"hidden": (N, D), "weight": (V, D), "teacher_hidden": (N, DT), "teacher_weight": (V, DT)}
    x = {name: torch.randn(shape, generator=g, device="cuda").to(dtype) for name, shape in shapes.items()}
    x["weight"] *= 3 * D**-0.5
    x["teacher_weight"] *= 3 * DT**-0.5
    return x


def both_losses(N, V, direction):
    """A mask, targets of which some are ignored, a temperature."""
    mask, targets = torch.arange(N, device="cuda") % 5 != 2, make_targets(N, V, ignored=(0, N - 1)).cuda()
    return {"direction": direction, "temperature": 1.5, "mask": mask, "targets": targets, "ce_weight": 0.3}


def ours(options, backend="triton"):
    return lambda **x: linear_kl(**x, **options, chunk_tokens=100, backend=backend)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dims", [LLAMA, QWEN, ODD], ids=["llama", "qwen", "odd"])
@pytest.mark.parametrize("backend", ["triton", "chunked"])
def test_agrees_with_float64(backend, dims, dtype, direction):
    options = both_losses(257, dims["V"], direction)
    forms = (
        (ours(options, backend), dtype),
        (lambda **x: plain(**x, **options), dtype),
        (lambda **x: plain(**x, **options), WIDE),
    )
    losses = [
        torch.stack([form(**cast(make(257, **dims, dtype=dtype, seed=s), d)) for s in range(3)]) for form, d in forms
    ]
    within_budget(*losses, "loss")
    x = make(257, **dims, dtype=dtype)
    found, eager, exact = (gradients(form, cast(x, d), LEAVES) for form, d in forms)
    again = gradients(forms[0][0], x, LEAVES)
    for name in LEAVES:
        within_budget(found[name], eager[name], exact[name], name)
        assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_products_keep_their_fp32_sums(dtype):
    """Neither logits nor the sum over chunks are rounded to 16 bits on the way."""
    x = make(512, **LLAMA, dtype=dtype)
    logits = chunked._product(x["hidden"], x["weight"].mT, torch.empty(512, 128256, device="cuda"))
    exact = x["hidden"].double() @ x["weight"].double().mT
    assert relative_error(logits, exact) < 1e-5
    total, g = torch.ones(128256, 2048, device="cuda"), logits.to(dtype)
    chunked._add_product(total, g.mT, x["hidden"])
    assert relative_error(total, 1 + g.double().mT @ x["hidden"].double()) < 1e-5


def test_bf16_states_under_an_fp32_head():
    """As training with autocast has it: the head's gradient is of fp32 precision but for the products' operands."""
    x = make(300, **LLAMA)
    x["weight"] = x["weight"].float()
    found = gradients(ours({}), x, LEAVES)
    exact = gradients(plain, {**cast(x, WIDE), "weight": x["weight"].bfloat16().double()}, LEAVES)
    assert [found[name].dtype for name in LEAVES] == [BF16, FP32]
    eager = gradients(plain, {**x, "weight": x["weight"].bfloat16()}, LEAVES)
    for name in LEAVES:
        assert relative_error(found[name], exact[name]) <= relative_error(eager[name], exact[name]), name


def test_the_default_is_triton_and_the_device_is_not_waited_for():
    x, options = make(300, **ODD), both_losses(300, ODD["V"], "forward")
    leaves = {name: t.requires_grad_() if name in LEAVES else t for name, t in x.items()}

    def step(backend):
        loss = linear_kl(**leaves, **options, backend=backend) + linear_cross_entropy(
            leaves["hidden"], leaves["weight"], options["targets"], backend=backend
        )
        return loss, *torch.autograd.grad(loss, (leaves["hidden"], leaves["weight"]))

    expected = step("triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("N", [4096, 65536])
def test_memory_is_that_of_a_chunk(N):
    """docs/linear_kl.md: 10 C V for logits and their gradient, and the two gradients that are results."""
    D, V, C = LLAMA["D"], LLAMA["V"], 1024
    x = make(N, **LLAMA)
    leaves = {name: t.requires_grad_() if name in LEAVES else t for name, t in x.items()}

    def step():
        linear_kl(**leaves, chunk_tokens=C).backward()
        leaves["hidden"].grad = leaves["weight"].grad = None

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    expected = 10 * C * V + 4 * V * D + 2 * N * D
    assert (
        torch.cuda.max_memory_allocated() - before <= expected + 64 * 2**20
    )  # hidden states of a chunk, losses, shares


def test_logits_beyond_two_billion():
    """The last token's row starts past 2^31 elements; small chunks give the same."""
    N, V = 17000, 128256
    if torch.cuda.mem_get_info()[0] < 30 * N * V // 2:
        pytest.skip("needs 33 GB of free memory")
    x = make(N, D=64, DT=64, V=V)
    targets = make_targets(N, V).cuda()
    found = []
    for chunk_tokens in (N, 1000):
        leaves = {name: t.detach().requires_grad_() if name in LEAVES else t for name, t in x.items()}
        loss = linear_kl(**leaves, targets=targets, chunk_tokens=chunk_tokens)
        found.append((loss.detach(), *torch.autograd.grad(loss, (leaves["hidden"], leaves["weight"]))))
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) < 1e-2
    assert relative_error(found[0][1][-100:], found[1][1][-100:]) < 1e-2


def test_a_graph_replays_it():
    x, options = make(300, **ODD), both_losses(300, ODD["V"], "reverse")
    leaves = {name: t.requires_grad_() if name in LEAVES else t for name, t in x.items()}

    def step():
        loss = linear_kl(**leaves, **options, chunk_tokens=128)
        return loss, *torch.autograd.grad(loss, (leaves["hidden"], leaves["weight"]))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            leaves["hidden"].mul_(-0.5)
        graph.replay()
        wanted = step()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
