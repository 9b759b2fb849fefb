"""gated_delta_rule: definition, gradients, packed sequences, split state, decode, hostile gates, registration."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from hylo_ops import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo_ops.gated_delta_rule import reference
from hylo_ops.testing import gradients, within_budget

BACKENDS = ["reference"]
NAMES = ("q", "k", "v", "g", "beta")


def make(B=2, T=37, G=2, H=4, K=8, V=12, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {
        "q": F.normalize(normal(B, T, G, K), dim=-1),
        "k": F.normalize(normal(B, T, G, K), dim=-1),
        "v": normal(B, T, H, V),
        "g": F.logsigmoid(normal(B, T, H) + 2),
        "beta": normal(B, T, H).sigmoid(),
    }
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return inputs | {"initial_state": normal(B, H, K, V).to(wide)}


def steps(inputs, scale=None):
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale
    return reference.step_by_step(*(inputs[name] for name in NAMES), scale, inputs.get("initial_state"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("T", "G", "H"), [(1, 1, 1), (37, 2, 4), (64, 3, 3), (65, 1, 4), (203, 2, 2)])
def test_equals_the_definition(backend, T, G, H):
    inputs = make(T=T, G=G, H=H)
    o, state = chunk_gated_delta_rule(**inputs, backend=backend)
    o_steps, state_steps = steps(inputs)
    torch.testing.assert_close(o, o_steps, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, state_steps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_zero_initial_state(backend):
    inputs = make(T=70)
    del inputs["initial_state"]
    o, _ = chunk_gated_delta_rule(**inputs, scale=0.3, backend=backend)
    torch.testing.assert_close(o, steps(inputs, 0.3)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_gates(backend):
    inputs = make(T=150)
    inputs["g"][0, 70, 1] = -torch.inf
    inputs["g"][1, 64:66] = torch.tensor([-torch.inf, -100.0], dtype=torch.float64)[:, None]
    inputs["g"][1, 3] = -torch.inf
    inputs["g"][0, 100:, 0] = 0
    inputs["g"][0, :, 2] = -100
    o, state = chunk_gated_delta_rule(**inputs, backend=backend)
    o_steps, state_steps = steps(inputs)
    torch.testing.assert_close(o, o_steps, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, state_steps, rtol=0, atol=1e-10)
    found = gradients(chunk_gated_delta_rule, inputs, (*NAMES, "initial_state"))
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert found["g"][1, 64].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend):
    inputs = make(B=1, T=6, G=1, H=2, K=3, V=2)
    leaves = [value.requires_grad_() for value in inputs.values()]

    def call(q, k, v, g, beta, state):
        return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, backend=backend)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_over_chunks_equal_those_of_the_definition(backend):
    inputs = make(B=1, T=131)

    def chunked(**kw):
        return chunk_gated_delta_rule(**kw, backend=backend)

    def plain(q, k, v, g, beta, initial_state):
        state, outputs = initial_state, []
        for t in range(q.shape[1]):
            q_t, k_t = (x[:, t].repeat_interleave(2, dim=1) for x in (q, k))
            state = state * g[:, t, :, None, None].exp()
            delta = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k_t))
            state = state + k_t[..., None] * delta[..., None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_t) * q.shape[-1] ** -0.5)
        return torch.stack(outputs, 1), state

    ours, theirs = (gradients(f, inputs, (*NAMES, "initial_state")) for f in (chunked, plain))
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_single_ones(backend):
    bounds = [0, 70, 70, 71, 140]
    inputs = make(B=1, T=bounds[-1])
    states = torch.randn(4, 4, 8, 12, dtype=torch.float64)
    cu = torch.tensor(bounds, dtype=torch.int32)
    o, final = chunk_gated_delta_rule(**{**inputs, "initial_state": states}, cu_seqlens=cu, backend=backend)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = {name: inputs[name][:, begin:end] for name in NAMES}
        o_n, final_n = chunk_gated_delta_rule(**alone, initial_state=states[n : n + 1], backend=backend)
        assert torch.equal(o[:, begin:end], o_n)
        assert torch.equal(final[n : n + 1], final_n)
    assert torch.equal(final[1], states[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cut", [1, 64, 100])
def test_two_parts_equal_the_whole(backend, cut):
    inputs = make(T=131)
    whole, final = chunk_gated_delta_rule(**inputs, backend=backend)
    parts, state = [], inputs["initial_state"]
    for tokens in (slice(0, cut), slice(cut, None)):
        part = {name: inputs[name][:, tokens] for name in NAMES}
        o, state = chunk_gated_delta_rule(**part, initial_state=state, backend=backend)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_does_not_depend_on_its_batch(backend):
    inputs = make(B=3, T=100, dtype=torch.float32)
    o, final = chunk_gated_delta_rule(**inputs, fixed_split=True, backend=backend)
    alone, final_alone = chunk_gated_delta_rule(
        **{name: value[1:2] for name, value in inputs.items()}, fixed_split=True, backend=backend
    )
    assert torch.equal(o[1:2], alone)
    assert torch.equal(final[1:2], final_alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_budget(backend, dtype):
    inputs = make(T=203, dtype=dtype)
    exact = steps({name: value.double() for name, value in inputs.items()})
    eager = steps(inputs)
    found = chunk_gated_delta_rule(**inputs, backend=backend)
    for name, ours, theirs, truth in zip(("o", "state"), found, eager, exact, strict=True):
        assert ours.dtype == theirs.dtype
        within_budget(ours, theirs, truth, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_from_a_pool_with_padding(backend):
    inputs = make(B=3, T=1)
    pool = torch.randn(5, 4, 8, 12, dtype=torch.float64)
    before, tokens = pool.clone(), [inputs[name] for name in NAMES]
    indices = torch.tensor([4, -1, 0], dtype=torch.int32)
    o = recurrent_gated_delta_rule(*tokens, pool, state_indices=indices, backend=backend)
    expected, final = chunk_gated_delta_rule(*tokens, initial_state=before[[4, 0, 0]])
    torch.testing.assert_close(o[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)
    torch.testing.assert_close(pool[[4, 0]], final[[0, 2]], rtol=0, atol=1e-12)
    assert not o[1].any()
    assert torch.equal(pool[1:4], before[1:4])


def test_strided_views():
    inputs = make(T=20, dtype=torch.float32)
    wide = torch.cat([inputs["v"]] * 2, dim=-1)[..., 6:18]
    (o, state), (same, same_state) = (chunk_gated_delta_rule(**{**inputs, "v": v}) for v in (wide, wide.contiguous()))
    assert torch.equal(o, same)
    assert torch.equal(state, same_state)


def test_registration():
    inputs = make(B=1, T=5, G=1, H=2, K=4, V=3, dtype=torch.float32)
    leaves = [value.requires_grad_() for value in inputs.values()]
    torch.library.opcheck(torch.ops.hylo_ops.chunk_gated_delta_rule, (*leaves, None, 0.5, False, None))
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(torch.ops.hylo_ops.chunk_gated_delta_rule, (*leaves[:5], None, cu, 0.5, False, None))
    tokens = [value[:, :1].detach() for value in leaves[:5]]
    torch.library.opcheck(
        torch.ops.hylo_ops.recurrent_gated_delta_rule, (*tokens, leaves[5].detach().clone(), 0.5, None, None)
    )


def test_compiles_without_a_graph_break():
    inputs = make(dtype=torch.float32)
    k = inputs.pop("k").requires_grad_()

    def step(k):
        o, state = chunk_gated_delta_rule(k=k, **inputs)
        token = [value[:, :1].detach() for value in (inputs["q"], k, inputs["v"], inputs["g"], inputs["beta"])]
        return (o + recurrent_gated_delta_rule(*token, state.detach())).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(k), step(k))
    torch.testing.assert_close(torch.autograd.grad(compiled(k), k), torch.autograd.grad(step(k), k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 37, 2, 9)}, r"k must have shape \[2, 37, 2, 8\], got \[2, 37, 2, 9\]"),
        ({"v": torch.zeros(2, 37, 3, 12)}, "heads of v must be a multiple of the heads of q, got .* 3 and .* 2"),
        ({"g": torch.zeros(2, 37, 2)}, r"g must have shape \[2, 37, 4\], got \[2, 37, 2\]"),
        ({"q": torch.zeros(2, 37, 2, 8, dtype=torch.int64)}, "q must be bfloat16 or .*, got int64"),
        ({"initial_state": torch.zeros(1, 4, 8, 12)}, r"initial_state must have shape \[2, 4, 8, 12\]"),
        ({"cu_seqlens": torch.tensor([0, 37], dtype=torch.int32)}, "batch must be 1, got 2"),
    ],
)
def test_rejected_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        chunk_gated_delta_rule(**{**make(dtype=torch.float32), **change})


@pytest.mark.parametrize("bounds", [[0, 20], [3, 37], [0, 40], [0, 30, 20, 37], [0]])
def test_rejected_packing(bounds):
    inputs = make(B=1, dtype=torch.float32)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 37 tokens of the input, got"):
        chunk_gated_delta_rule(**inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_decode_takes_one_token():
    inputs = make(dtype=torch.float32)
    state = inputs.pop("initial_state")
    with pytest.raises(ValueError, match="v must hold one token a sequence, got 37"):
        recurrent_gated_delta_rule(*inputs.values(), state)
