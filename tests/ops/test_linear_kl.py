"""linear_kl and linear_cross_entropy: definitions, gradients, tokens that do not count, room taken, rejected inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_ops import linear_cross_entropy, linear_kl
from hylo_ops.backend import choose
from hylo_ops.linear_kl import chunked
from hylo_ops.linear_kl.op import BACKENDS as ALL_BACKENDS
from hylo_ops.testing import cast, gradients, within_budget

BACKENDS = ["chunked", "reference"]
DIRECTIONS = ["forward", "reverse"]
DTYPE = torch.float64
LEAVES = ("hidden", "weight")
IGNORED = -100


def make(N=11, D=6, DT=10, V=31, dtype=DTYPE, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, D), "weight": (V, D), "teacher_hidden": (N, DT), "teacher_weight": (V, DT)}
    return {name: (size * torch.randn(shape, generator=g, dtype=DTYPE)).to(dtype) for name, shape in shapes.items()}


def student(x):
    return {name: x[name] for name in LEAVES}


def make_targets(N=11, V=31, ignored=()):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[list(ignored)] = IGNORED
    return targets


def plain(
    hidden, weight, teacher_hidden, teacher_weight, temperature=1.0, direction="forward", mask=None, targets=None,
    ce_weight=1.0,
):  # fmt: skip
    """The definition through PyTorch's own losses, in the inputs' dtype, on all logits."""
    logits, teacher = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    log_q, log_p = (
        (z.to(torch.promote_types(z.dtype, torch.float32)) / temperature).log_softmax(-1) for z in (logits, teacher)
    )
    if mask is not None:
        log_q, log_p = log_q[mask], log_p[mask]
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    loss = F.kl_div(first, second, log_target=True, reduction="batchmean")
    if targets is not None:
        loss = loss + ce_weight * F.cross_entropy(logits.to(loss.dtype), targets)
    return loss


def close(got, expected, rtol=1e-11):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-13)


def loss_and_gradients(function, x):
    leaves = {name: x[name].detach().requires_grad_() for name in LEAVES}
    loss = function(**{**x, **leaves})
    return loss.detach(), *torch.autograd.grad(3 * loss, tuple(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
def test_kl_equals_the_definition(backend, direction, temperature, chunk_tokens):
    """Chunks that divide the tokens, that do not, of one token, and of more than there are."""
    x, options = make(), {"temperature": temperature, "direction": direction}
    got = loss_and_gradients(lambda **x: linear_kl(**x, **options, chunk_tokens=chunk_tokens, backend=backend), x)
    close(got, loss_and_gradients(lambda **x: plain(**x, **options), x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_losses_from_the_same_logits(backend, direction, temperature):
    """KL over the mask, cross-entropy over its own tokens, the latter at temperature 1."""
    x = make()
    mask = torch.arange(11) % 4 != 1
    options = {"temperature": temperature, "direction": direction, "mask": mask, "ce_weight": 0.3}
    options["targets"] = make_targets(ignored=(0, 1, 7))
    got = loss_and_gradients(lambda **x: linear_kl(**x, **options, chunk_tokens=4, backend=backend), x)
    close(got, loss_and_gradients(lambda **x: plain(**x, **options), x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_cross_entropy_equals_the_definition(backend, reduction, chunk_tokens):
    x, targets, options = make(), make_targets(ignored=(2, 10)), {"reduction": reduction}

    def ours(hidden, weight, **_):
        return linear_cross_entropy(hidden, weight, targets, **options, chunk_tokens=chunk_tokens, backend=backend)

    expected = loss_and_gradients(lambda hidden, weight, **_: F.cross_entropy(hidden @ weight.T, targets, **options), x)
    close(loss_and_gradients(ours, x), expected)


def test_another_index_may_be_ignored():
    x, targets = make(), make_targets()
    ignoring = linear_cross_entropy(**student(x), targets=targets, ignore_index=int(targets[0]))
    expected = F.cross_entropy(x["hidden"] @ x["weight"].T, targets, ignore_index=int(targets[0]))
    torch.testing.assert_close(ignoring, expected, rtol=1e-12, atol=0)
    assert ignoring != linear_cross_entropy(**student(x), targets=targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_is_the_mean_times_its_tokens(backend):
    x, mask, targets = make(), torch.arange(11) < 8, make_targets(ignored=(4, 5))
    kl, both = (
        [linear_kl(**x, mask=mask, reduction=r, backend=backend, **more) for r in ("sum", "mean")]
        for more in ({}, {"targets": targets, "ce_weight": 0.5})
    )
    torch.testing.assert_close(kl[0], 8 * kl[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(both[0] - kl[0], 9 * (both[1] - kl[1]), rtol=1e-11, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients(backend, direction):
    x = make(N=5, D=3, DT=4, V=7)
    mask, targets = torch.arange(5) != 2, make_targets(5, 7, ignored=(4,))

    def call(hidden, weight):
        return linear_kl(
            hidden, weight, x["teacher_hidden"], x["teacher_weight"], temperature=1.7, direction=direction, mask=mask,
            targets=targets, ce_weight=0.4, chunk_tokens=2, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, tuple(t.requires_grad_() for t in student(x).values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_student_that_is_its_teacher(backend, direction):
    x = make(DT=6)
    x["teacher_hidden"], x["teacher_weight"] = x["hidden"], x["weight"]
    loss, *found = loss_and_gradients(lambda **x: linear_kl(**x, direction=direction, backend=backend), x)
    assert abs(loss) < 1e-14
    assert all(g.abs().max() < 1e-14 for g in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_student_gets_a_gradient(backend):
    x = {name: t.requires_grad_() for name, t in make().items()}
    linear_kl(**x, backend=backend).backward()
    assert [name for name, t in x.items() if t.grad is not None] == list(LEAVES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", LEAVES)
def test_one_of_the_two_may_be_frozen(backend, frozen):
    x = make()
    (free,) = set(LEAVES) - {frozen}
    expected = loss_and_gradients(plain, x)[1 + LEAVES.index(free)]
    x[free].requires_grad_()
    (3 * linear_kl(**x, chunk_tokens=4, backend=backend)).backward()
    torch.testing.assert_close(x[free].grad, expected, rtol=1e-11, atol=1e-13)
    assert x[frozen].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_error_budget(backend, dtype, direction):
    drawn = [make(N=37, D=64, DT=48, V=301, dtype=dtype, size=0.5, seed=seed) for seed in range(8)]
    options = {"direction": direction, "targets": make_targets(37, 301, ignored=(3,)), "ce_weight": 0.2}

    def ours(**x):
        return linear_kl(**x, **options, chunk_tokens=16, backend=backend)

    def eager(**x):
        return plain(**x, **options)

    assert ours(**drawn[0]).dtype == torch.float32
    forms = ((ours, dtype), (eager, dtype), (eager, DTYPE))
    losses = [torch.stack([form(**cast(x, d)) for x in drawn]) for form, d in forms]
    within_budget(*losses, "loss")
    found, theirs, exact = (gradients(form, cast(drawn[0], d), LEAVES) for form, d in forms)
    for name in LEAVES:
        assert found[name].dtype == dtype
        within_budget(found[name], theirs[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_in_fp32_beside_bf16_hidden_states(backend):
    """Its gradient is not rounded to 16 bits. The teacher has a dtype of its own."""
    x = {**make(), **student(cast(make(), torch.float32))}
    x["hidden"] = x["hidden"].bfloat16()
    loss, d_hidden, d_weight = loss_and_gradients(lambda **x: linear_kl(**x, backend=backend), x)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (DTYPE, torch.bfloat16, torch.float32)
    assert not torch.equal(d_weight, d_weight.bfloat16().float())


def test_a_gradient_smaller_than_fp16_survives_the_mean():
    """1 / N comes after the products: a loss scale of 2^16 finds what fp16 would have lost in the forward."""
    x = make(N=2000, D=8, dtype=torch.float16, size=0.1)

    def scaled(**x):
        return 2**16 * linear_kl(**x, chunk_tokens=512, backend="chunked")

    found = gradients(scaled, x, LEAVES)
    exact = gradients(lambda **x: 2**16 * plain(**x), cast(x, DTYPE), LEAVES)
    eager = gradients(lambda **x: 2**16 * plain(**x), x, LEAVES)
    for name in LEAVES:
        within_budget(found[name], eager[name], exact[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hole", [torch.nan, torch.inf])
def test_what_does_not_count_may_hold_anything(backend, hole):
    """Masked tokens and ignored targets; one token counts for the cross-entropy alone."""
    x, clean = make(), make()
    mask = torch.tensor([True] * 8 + [False] * 3)
    options = {"mask": mask, "targets": make_targets(ignored=(9, 10)), "chunk_tokens": 4, "backend": backend}
    x["hidden"][9:], x["teacher_hidden"][8:] = hole, hole
    got = loss_and_gradients(lambda **x: linear_kl(**x, **options), x)
    close(got, loss_and_gradients(lambda **x: linear_kl(**x, **options), clean))
    assert torch.equal(got[1][9:], torch.zeros_like(got[1][9:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["hidden", "teacher_hidden"])
def test_nan_that_counts_shows(backend, place):
    x = make()
    x[place][3, 2] = torch.nan
    assert linear_kl(**x, chunk_tokens=4, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", [31, -1, 2**40])
def test_a_class_that_there_is_not_shows(backend, target):
    x, targets = make(), make_targets()
    targets[5] = target
    assert linear_cross_entropy(**student(x), targets=targets, backend=backend).isnan()
    assert linear_kl(**x, targets=targets, backend=backend).isnan()
    assert linear_kl(**x, targets=targets, ignore_index=target, backend=backend).isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", [0, 3])
def test_no_token_that_counts(backend, N):
    x = make(N=N)
    options = {"mask": torch.zeros(N, dtype=torch.bool), "targets": torch.full((N,), IGNORED), "backend": backend}
    for one in loss_and_gradients(lambda **x: linear_kl(**x, **options), x):
        assert torch.equal(one, torch.zeros_like(one))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
def test_logits_far_apart(backend, direction, size):
    """All alike; probabilities of 0 in either distribution; logits of 1e8."""
    x = make(dtype=torch.float32, size=size)
    options = {"direction": direction, "targets": make_targets()}
    got = loss_and_gradients(lambda **x: linear_kl(**x, **options, backend=backend), x)
    for one, other in zip(got, loss_and_gradients(lambda **x: plain(**x, **options), cast(x, DTYPE)), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_views(backend):
    x = make()
    views = {name: torch.stack([t, t], -1)[..., 0] for name, t in x.items()}
    views["weight"] = x["weight"].T.contiguous().T
    close(
        loss_and_gradients(lambda **x: linear_kl(**x, chunk_tokens=4, backend=backend), views),
        loss_and_gradients(lambda **x: linear_kl(**x, chunk_tokens=4, backend=backend), x),
    )


def test_two_backwards_of_one_forward():
    x = make()
    x["hidden"].requires_grad_()
    loss = linear_kl(**x, chunk_tokens=4)
    first, second = (torch.autograd.grad(g * loss, x["hidden"], retain_graph=True)[0] for g in (1.0, 2.0))
    torch.testing.assert_close(second, 2 * first, rtol=1e-12, atol=0)


def test_autocast_has_no_say():
    x = cast(make(), torch.float32)
    expected = linear_kl(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_kl(**x), expected)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.parametrize("N", [64, 640])
@pytest.mark.parametrize("reverse", [True, False])
def test_logits_of_a_chunk_and_no_more(N, reverse):
    """Called beside the dispatcher, which shows an op from outside only."""
    shares = torch.ones(N, dtype=DTYPE)
    with Largest() as made:
        inputs = make(N=N, D=4, DT=5, V=4096).values()
        chunked.forward(*inputs, make_targets(N, 4096), shares, shares, 1.5, reverse, 8, True, True)
    assert made.largest == 8 * 4096


def test_without_a_gradient_none_is_made(monkeypatch):
    given = []
    rows = chunked.rows
    monkeypatch.setattr(chunked, "rows", lambda *args: (given.append(args[-1]), rows(*args))[1])
    x = make()
    x["hidden"].requires_grad_()
    with torch.no_grad():
        linear_kl(**x)
    linear_kl(**x)
    assert given[0] is None
    assert given[1] is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    x = make(N=5, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in student(x).values()]
    shares = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    others = (x["teacher_hidden"], x["teacher_weight"], make_targets(5), shares, 0.5 * shares)
    torch.library.opcheck(torch.ops.hylo_ops.linear_kl, (*leaves, *others, 1.5, True, 2, True, True, backend))


def test_compiles_without_a_graph_break():
    x = cast(make(), torch.float32)
    targets = make_targets(ignored=(2,))

    def step(**x):
        return linear_kl(**x, targets=targets, chunk_tokens=4) + linear_cross_entropy(
            **student(x), targets=targets, chunk_tokens=4
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    close(loss_and_gradients(compiled, x), loss_and_gradients(step, x), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 11, 6)}, r"hidden must have shape \[N, D\], got \[2, 11, 6\]"),
        ({"hidden": torch.zeros(())}, r"hidden must have shape \[N, D\], got \[\]"),
        ({"hidden": torch.zeros(11, 6, dtype=torch.int32)}, "hidden must be bfloat16 or .*, got int32"),
        ({"weight": torch.zeros(31, 7)}, r"weight must have shape \[V, 6\], got \[31, 7\]"),
        ({"teacher_hidden": torch.zeros(12, 10)}, r"teacher_hidden must have shape \[11, DT\], got \[12, 10\]"),
        ({"teacher_weight": torch.zeros(32, 10)}, r"teacher_weight must have shape \[31, 10\], got \[32, 10\]"),
        ({"mask": torch.zeros(10, dtype=torch.bool)}, r"mask must have shape \[11\], got \[10\]"),
        ({"mask": torch.zeros(11)}, "mask must be bool, got float32"),
        ({"targets": torch.zeros(11, 1, dtype=torch.int64)}, r"targets must have shape \[11\], got \[11, 1\]"),
        ({"targets": torch.zeros(11, dtype=torch.int32)}, "targets must be int64, got int32"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"direction": "backward"}, r"direction must be one of \['forward', 'reverse'\], got 'backward'"),
        ({"reduction": "none"}, r"reduction must be one of \['mean', 'sum'\], got 'none'"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(**{**cast(make(), torch.float32), **change})


def test_a_named_backend_that_is_not_there():
    with pytest.raises(NotImplementedError, match="no backend 'tpu'"):
        linear_kl(**make(), backend="tpu")


def test_without_a_gpu_triton_says_so():
    with pytest.raises(NotImplementedError, match="triton: hidden is on cpu, not on a CUDA device"):
        linear_kl(**cast(make(), torch.float32), backend="triton")


class OnGpu(torch.Tensor):
    """Says that it is on a GPU, for backends to be chosen; nothing runs on it."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DTYPE])
def test_the_fastest_backend_takes_the_models(dtype):
    """triton for all but fp64, which any device has in chunks."""
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    x = {name: torch.empty(2, 3, dtype=dtype).as_subclass(OnGpu) for name in names}
    for teacher in (x["teacher_hidden"], None):
        chosen = choose("linear_kl", ALL_BACKENDS, None, {**x, "teacher_hidden": teacher}).name
        assert chosen == ("chunked" if dtype == DTYPE else "triton")
