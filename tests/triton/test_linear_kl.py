"""The Triton kernels of linear_kl in the interpreter, against float64."""

import pytest
import torch

from hylo_ops import linear_cross_entropy, linear_kl
from hylo_ops.linear_kl import chunked, triton_fwd
from hylo_ops.testing import cast, gradients, within_budget
from tests.ops.test_linear_kl import LEAVES, loss_and_gradients, make, make_targets, plain, student

FP32, WIDE = torch.float32, torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """A vocabulary has several of them, the last one not full."""
    monkeypatch.setattr(triton_fwd, "_BV_LOSS", 16)
    monkeypatch.setattr(triton_fwd, "_BV_GRADIENT", 32)


def ours(options):
    return lambda **x: linear_kl(**x, **options, chunk_tokens=4, backend="triton")


def plain_of(options):
    return lambda **x: plain(**x, **options)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP32])
def test_agrees_with_float64(direction, temperature, with_targets, dtype):
    options = {"direction": direction, "temperature": temperature, "mask": torch.arange(11) % 4 != 1}
    if with_targets:
        options |= {"targets": make_targets(V=77, ignored=(0, 1, 7)), "ce_weight": 0.3}
    drawn = [make(V=77, dtype=dtype, seed=seed, size=0.7) for seed in range(4)]
    forms = ((ours(options), dtype), (plain_of(options), dtype), (plain_of(options), WIDE))
    losses = [torch.stack([form(**cast(x, d)) for x in drawn]) for form, d in forms]
    within_budget(*losses, "loss")
    found, eager, exact = (gradients(form, cast(drawn[0], d), LEAVES) for form, d in forms)
    for name in LEAVES:
        within_budget(found[name], eager[name], exact[name], name)


@pytest.mark.parametrize("V", [1, 16, 33])
def test_cross_entropy_alone(V):
    x, targets = make(V=V, dtype=FP32), make_targets(V=V, ignored=(3,))

    def function(backend):
        return lambda hidden, weight, **_: linear_cross_entropy(
            hidden, weight, targets, chunk_tokens=4, backend=backend
        )

    found, exact = (loss_and_gradients(function(b), cast(x, d)) for b, d in (("triton", FP32), ("reference", WIDE)))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_logits_far_apart(direction, size):
    """A KL of thousands of nats is itself rounded, and where q is 1 the reverse gradient is what is left of it."""
    x, options = make(dtype=FP32, size=size), {"direction": direction, "targets": make_targets()}
    found, exact = loss_and_gradients(ours(options), x), loss_and_gradients(plain_of(options), cast(x, WIDE))
    rounding = 4 * torch.finfo(FP32).eps * len(x["hidden"]) * float(exact[0]) if direction == "reverse" else 0.0
    for one, other, times in zip(found, exact, (0.0, x["weight"].max(), x["hidden"].max()), strict=True):
        atol = 2e-5 * float(other.abs().max()) + rounding * float(times)
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=atol)


@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_what_does_not_count_may_hold_anything(hole):
    x, clean = make(dtype=FP32), make(dtype=FP32)
    options = {"mask": torch.arange(11) < 8, "targets": make_targets(ignored=(9, 10))}
    x["hidden"][9:], x["teacher_hidden"][8:] = hole, hole
    for one, other in zip(loss_and_gradients(ours(options), x), loss_and_gradients(ours(options), clean), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("target", [31, -1, 2**40])
def test_a_class_that_there_is_not_shows(target):
    x, targets = make(dtype=FP32), make_targets()
    targets[5] = target
    assert linear_cross_entropy(**student(x), targets=targets, backend="triton").isnan()
    assert linear_kl(**x, targets=targets, ignore_index=target, backend="triton").isfinite()


@pytest.mark.parametrize("place", ["hidden", "teacher_hidden"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_nan_that_counts_shows(place, direction):
    x = make(dtype=FP32)
    x[place][3, 2] = torch.nan
    assert ours({"direction": direction})(**x).isnan()


def test_the_gradient_may_lie_on_the_logits():
    """Where products are fp32; a tile reads its logits before it writes."""
    x = make(dtype=FP32)
    logits, teacher = x["hidden"] @ x["weight"].T, x["teacher_hidden"] @ x["teacher_weight"].T
    terms = chunked.Terms(make_targets(), torch.ones(11), torch.ones(11), 1.5, True)
    apart = torch.empty_like(logits)
    losses = triton_fwd.rows(logits, teacher, terms, apart)
    assert torch.equal(losses, triton_fwd.rows(logits, teacher, terms, logits))
    assert torch.equal(apart, logits)


def test_what_it_cannot_run():
    with pytest.raises(NotImplementedError, match=r"triton: hidden is torch.float64, not bfloat16"):
        linear_kl(**make(), backend="triton")
    x = {**make(), **student(make(dtype=FP32))}
    with pytest.raises(NotImplementedError, match=r"triton: teacher_hidden is torch.float64, not bfloat16"):
        linear_kl(**x, backend="triton")


def test_registration():
    """In the interpreter backend=None takes Triton."""
    x = make(N=5, dtype=FP32)
    leaves = [t.requires_grad_() for t in student(x).values()]
    shares = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    others = (x["teacher_hidden"], x["teacher_weight"], make_targets(5), shares, 0.5 * shares)
    torch.library.opcheck(torch.ops.hylo_ops.linear_kl, (*leaves, *others, 1.5, True, 2, True, True, None))
