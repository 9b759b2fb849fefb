"""Benchmarks of Mamba2's scan, convolution and whole block without a GPU: peers are their argument forms over the
reference, the clocks are replaced, everything else is real.
"""

import json
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import hylo_ops
from bench import __main__ as command
from bench import causal_conv1d, forms, mamba2, shapes, ssd, timing
from bench.contest import Roofs
from bench.peers import Missing
from bench.peers import causal_conv1d as conv_peers
from bench.peers import mamba2 as mixer_peers
from bench.peers import ssd as scan_peers
from tests import fake_libraries

ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)
# fewer heads of x and b than of c, fewer of c than heads; as many of each
FEWER = replace(ssd.CASES["hylo-1b-8k"], name="fewer", B=2, T=70, G=2, H=4, K=16, V=32, HX=2, GB=1, gates=("trained",))
EQUAL = replace(FEWER, name="equal", G=4, HX=4, GB=4)
CONV = replace(causal_conv1d.CASES["d2304-8k"], name="tiny", B=2, T=21, D=24)
MIXERS = {
    "hylo": shapes.MixerCase("hylo", 2, 66, 4, 4, 16, 8, 2, 1, NG=4),
    "mamba2": shapes.MixerCase("mamba2", 2, 66, 1, 4, 16, 8, 4, 1, NG=1),
}


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU, clocks that return fixed numbers: ours short ones, a peer longer ones."""
    times = {"reference": {"us": 20.0, "graph_us": 4.0}}
    longer = {"us": 30.0, "graph_us": 12.0}
    monkeypatch.setattr(timing, "rotate", lambda calls, seconds: {n: dict(times.get(n, longer)) for n in calls})
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 123)
    for module in (ssd, causal_conv1d, mamba2):
        monkeypatch.setattr(module, "draw", partial(module.draw, device="cpu"))
    monkeypatch.setattr(mamba2, "OF_PASS", {pass_: ["reference"] for pass_ in mamba2.OF_PASS})


@pytest.fixture
def libraries(monkeypatch):
    fake_libraries.install(monkeypatch)
    monkeypatch.setenv("FLA_CONV_GLUON", "0")  # put back after the test


def rows(module, case, chosen_peers=None, backends=("reference",)):
    names = module.PEERS if chosen_peers is None else chosen_peers
    return json.loads(json.dumps(list(module.run(case, list(backends), list(names), ROOFS))))


# Cases, inputs and counts


def test_the_scan_has_every_case_of_the_bar():
    """(B, T, H, V, G, K, HX, GB) of issue 4's table."""
    hylo_1b, hylo_3b, qwen = (32, 64, 32, 64, 8, 8), (24, 128, 24, 128, 8, 8), (16, 128, 16, 128, 8, 8)
    one_group, eight_groups = (32, 64, 1, 128, 32, 1), (64, 64, 8, 128, 64, 8)
    expected = [
        *((B, T, *hylo_1b) for B, T in ((1, 8192), (8, 4096), (1, 65536))),
        *((1, T, *hylo_3b) for T in (8192, 65536)),
        (1, 8192, *qwen),
        *((B, T, *one_group) for B, T in ((1, 8192), (1, 32768), (8, 4096))),
        (1, 65536, *eight_groups),
    ]
    letters = ("B", "T", "H", "V", "G", "K", "HX", "GB")
    cases = list(ssd.CASES.values())
    plain = [tuple(c.shape[x] for x in letters) for c in cases if c.T > 1 and not c.initial_state]
    assert plain == expected
    assert {c.gates for c in cases if (c.B, c.T) == (1, 8192) and not c.initial_state} == {("trained", "strong")}
    assert sum(c.initial_state for c in cases) == 2
    for dtype in (torch.float32, torch.bfloat16):
        decoded = [tuple(c.shape[x] for x in letters) for c in cases if c.T == 1 and c.state_dtype == dtype]
        assert decoded == [(B, 1, *dims) for dims in (one_group, hylo_1b) for B in (1, 32, 256)]
    assert [c.T for c in shapes.SSD_LENGTHS] == [4**n * 1024 for n in range(1, 6)]
    assert {c.passes for c in cases} == {("forward", "forward_backward"), ("decode",)}


def test_convolution_and_block_have_every_case_of_the_bar():
    found = {(c.B, c.T, c.D, c.W) for c in causal_conv1d.CASES.values()}
    long = {(1, T, D, 4) for T in (8192, 32768, 65536) for D in (2304, 6144)}
    assert found == long | {(B, 1, D, 4) for B in (1, 32, 256) for D in (2304, 6144)}
    assert {(c.channels, c.NG, c.B, c.T) for c in mamba2.CASES.values()} == {
        (channels, NG, B, T)
        for channels, NG in ((512 + 512 + 2048, 32), (2304, 1))
        for B, T in ((1, 8192), (1, 1), (32, 1), (256, 1))
    }
    stems = [
        "causal_conv1d",
        "gated_delta_rule",
        "gated_rms_norm",
        "l2_norm",
        "linear_kl",
        "mamba2",
        "mla_absorb",
        "mla_attention",
        "mla_prefill",
        "rms_norm",
        "sampling",
        "skinny_linear",
        "ssd",
        "swiglu",
    ]
    assert stems == command.STEMS


def test_steps_are_those_of_a_trained_layer_and_strong_ones_forget_400_nats_in_256_tokens():
    case = replace(FEWER, T=512)
    trained, strong = (ssd.draw(case, gates, "cpu") for gates in ("trained", "strong"))
    for x, (least, greatest) in ((trained, (1e-3, 0.1)), (strong, (0.095, 0.105))):
        step = F.softplus(x.dt.double() + x.dt_bias.double())
        assert 0.96 * least < step.min()
        assert step.max() < 1.04 * greatest
        assert step.log().median() == pytest.approx(math.log(least * greatest) / 2, abs=0.3)
        assert torch.equal(x.dt_bias, x.dt_bias.bfloat16().float()), "FlashInfer gets it in bf16"
    assert -16 <= trained.a.min() < trained.a.max() <= -1
    decay = F.softplus(strong.dt.float() + strong.dt_bias) * strong.a
    torch.testing.assert_close(decay[:, :256].sum(1), torch.full((2, 4), -410.0), rtol=0.02, atol=0)


def test_work_of_the_scan_by_hand():
    """The cost model's table: 72 MB and 10.9 GF, 110 MB and 26 GF; then fewer heads of x and b, and a decode step."""
    forward, both = (ssd.work(ssd.CASES["mamba2-8k"], pass_) for pass_ in ("forward", "forward_backward"))
    state = 4 * 32 * 64 * 128
    assert forward.bytes == 8192 * (4 * 2048 + 4 * 128 + 2 * 32) + state
    assert both.bytes - forward.bytes == 8192 * (6 * 2048 + 8 * 128 + 4 * 32) + state
    assert forward.flop == 8192 * (128 * (128 + 2048) + 4 * 32 * 64 * 128)
    assert both.flop - forward.flop == 8192 * (128 * (3 * 128 + 2 * 2048) + 10 * 32 * 64 * 128)
    hylo = ssd.work(ssd.CASES["hylo-1b-8k"], "forward")
    assert hylo.bytes == 8192 * 2 * (512 + 512 + 2048 + 32 + 2048) + 4 * 32 * 64 * 64
    with_state = [ssd.work(ssd.CASES["hylo-1b-8k-state"], pass_) for pass_ in ("forward", "forward_backward")]
    without = [ssd.work(ssd.CASES["hylo-1b-8k"], pass_) for pass_ in ("forward", "forward_backward")]
    extra = [a.bytes - b.bytes for a, b in zip(with_state, without, strict=True)]
    assert extra == [2**19, 3 * 2**19], "read; read again, and its gradient written"
    decode = ssd.work(ssd.CASES["mamba2-decode-32-bf16-state"], "decode")
    assert decode.flop == 5 * 32 * 32 * 64 * 128
    assert decode.bytes == 32 * 2 * (4096 + 256 + 32) + 2 * 2 * 32 * 32 * 64 * 128


def test_work_of_convolution_and_block_by_hand():
    passes = ("forward", "forward_backward")
    forward, both = (causal_conv1d.work(causal_conv1d.CASES["d2304-8k"], pass_) for pass_ in passes)
    assert forward.bytes == 2 * (2 * 8192 * 2304 + 5 * 2304)
    assert both.bytes - forward.bytes == 2 * (3 * 8192 * 2304 + 2 * 5 * 2304)
    assert (forward.flop, both.flop) == (13 * 8192 * 2304, 47 * 8192 * 2304)
    decode = causal_conv1d.work(causal_conv1d.CASES["d2304-decode-32"], "decode")
    assert decode.bytes == 2 * 2304 * (32 * (2 + 8) + 5)
    forward, both = (mamba2.work(mamba2.CASES["hylo-1b-8k"], pass_) for pass_ in passes)
    parameters, state = 2 * (3072 * 5 + 2048), 4 * 32 * 64 * 64
    assert forward.bytes == 8192 * 2 * (2048 + 3072 + 32 + 2048) + parameters + state
    assert both.bytes - forward.bytes == 8192 * 2 * (2 * (2048 + 3072 + 32) + 2048) + 2 * parameters + state
    assert forward.flop - ssd.work(ssd.CASES["hylo-1b-8k"], "forward").flop == 8192 * (13 * 3072 + 9 * 2048)
    decode = mamba2.work(mamba2.CASES["mamba2-decode-32"], "decode")
    moved = 2 * 4 * 32 * 32 * 64 * 128 + 32 * 2 * (2048 + 2304 + 32 + 2048) + 2 * 32 * 2304 * 4 * 2
    assert decode.bytes == moved + 2 * (2304 * 5 + 2048)


@pytest.mark.parametrize("module", [ssd, causal_conv1d], ids=["ssd", "causal_conv1d"])
def test_the_float64_check_fits_the_memory(module):
    for case in (*module.CASES.values(), *getattr(module, "EXTRA_CASES", {}).values()):
        tokens = module.checked_tokens(case)
        assert module.exact_bytes(replace(case, T=tokens)) <= module.MAX_EXACT_BYTES
        assert tokens == case.T or (tokens % 4096 == 0 and tokens >= 32768)


# Rows


@pytest.mark.parametrize("case", [FEWER, replace(EQUAL, initial_state=True)], ids=["fewer", "equal-state"])
def test_every_peer_of_the_scan_computes_the_same(on_cpu, libraries, case):
    forward, both = rows(ssd, case)
    assert [(r["pass"], r["gates"], r["backend"]) for r in (forward, both)] == [
        ("forward", "trained", "reference"),
        ("forward_backward", "trained", "reference"),
    ]
    gradients = {"dx", "ddt", "da", "db", "dc", "dd", "ddt_bias"}
    assert set(forward["errors"]) == {"o", "final_state"}
    assert set(both["errors"]) == gradients | ({"dinitial_state"} if case.initial_state else set())
    present = ["mamba_ssm_c128", "mamba_ssm_c256", "vllm_c128", "vllm_c256", "fla", "fla_full"]
    assert list(forward["peers"]) == present
    for row in (forward, both):
        assert row["shape"] == case.shape
        assert (row["checked_T"], row["host_us"], row["peak_bytes"]) == (70, None, 123)
        for name, entry in row["peers"].items():
            if row is both and name.startswith("vllm"):
                assert entry == {"missing": "has no backward"}
            else:
                assert entry["errors"].keys() == row["errors"].keys()
                assert entry["error"] < 1e-2, (row["pass"], name)
    assert forward["ratio"] == pytest.approx(3.0)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B", [1, 3])
def test_every_peer_of_the_state_update_computes_the_same(on_cpu, libraries, state_dtype, B):
    (row,) = rows(ssd, replace(FEWER, B=B, T=1, state_dtype=state_dtype))
    assert (row["pass"], row["host_us"]) == ("decode", 7.5 if B == 1 else None)
    assert set(row["errors"]) == {"o", "state"}
    assert list(row["peers"]) == ["mamba_ssm", "vllm", "flashinfer"]
    assert all(entry["error"] < 5e-3 for entry in row["peers"].values())


def test_every_peer_of_the_convolution_computes_the_same(on_cpu, libraries):
    forward, both = rows(causal_conv1d, CONV)
    (decode,) = rows(causal_conv1d, replace(CONV, T=1))
    names = ["torch", "causal_conv1d", "fla_gluon", "fla_triton", "vllm"]
    for row, results in ((forward, {"y"}), (both, {"dx", "dweight", "dbias"}), (decode, {"y", "newest"})):
        assert set(row["errors"]) == results
        assert list(row["peers"]) == names
        missing = {name: entry["missing"] for name, entry in row["peers"].items() if "missing" in entry}
        assert (
            missing
            == {
                "forward": {},
                "forward_backward": {"vllm": "has no backward"},
                "decode": {"fla_gluon": "has no single-token form in this language"},
            }[row["pass"]]
        )
        assert all(entry["error"] < 1e-2 for entry in row["peers"].values() if "missing" not in entry)


def test_fla_is_asked_for_each_of_its_languages(libraries, monkeypatch):
    inputs = causal_conv1d.draw(CONV, "cpu")
    for name, switch in (("fla_gluon", "1"), ("fla_triton", "0")):
        conv_peers.FORMS[name](inputs).forward()
        assert os.environ["FLA_CONV_GLUON"] == switch
    wide = causal_conv1d.draw(replace(CONV, W=5), "cpu")
    with pytest.raises(Missing, match="requires a width of 2, 3, or 4"):
        conv_peers.FORMS["fla_gluon"](wide)
    monkeypatch.setattr(fake_libraries.GluonBackend, "is_available", lambda: False)
    with pytest.raises(Missing, match="has no gluon here"):
        conv_peers.FORMS["fla_gluon"](inputs)


@pytest.mark.parametrize("case", MIXERS.values(), ids=list(MIXERS))
def test_every_peer_of_the_block_computes_the_same(on_cpu, libraries, case):
    forward, both = rows(mamba2, case)
    assert set(forward["errors"]) == {"y", "final_state"}
    parameters = {"dconv_weight", "dconv_bias", "da", "dnorm_weight", "dd", "ddt_bias"}
    assert set(both["errors"]) == {"dz", "dxbc", "ddt"} | parameters
    for row in (forward, both):
        assert list(row["peers"]) == ["mamba_ssm_c128", "mamba_ssm_c256"]
        assert all(entry["error"] < 2e-2 for entry in row["peers"].values())
    (decode,) = rows(mamba2, replace(case, T=1))
    assert set(decode["errors"]) == {"y", "conv_state", "state"}
    assert list(decode["peers"]) == ["mamba_ssm", "vllm", "flashinfer"]
    assert all(entry["error"] < 2e-2 for entry in decode["peers"].values())


def test_a_norm_of_other_groups_is_not_mamba_ssms(libraries):
    inputs = mamba2.draw(replace(MIXERS["hylo"], NG=1), "cpu")
    with pytest.raises(Missing, match="as many groups as c has heads"):
        mixer_peers.FORMS["mamba_ssm_c128"](inputs)


@pytest.mark.parametrize(
    ("module", "case"),
    [(ssd, FEWER), (ssd, replace(FEWER, T=1)), (causal_conv1d, CONV), (mamba2, MIXERS["hylo"])],
    ids=["ssd", "ssd-decode", "causal_conv1d", "mamba2"],
)
def test_what_is_not_there_is_missing_with_its_reason(on_cpu, module, case):
    absent = [name for name in module.PEERS if name != "torch"]
    found = rows(module, case, absent)
    assert found
    for row in found:
        assert all(entry["missing"] for entry in row["peers"].values())
        assert (row["best_peer"], row["ratio"], row["us"]) == (None, None, 20.0)
    command.show(found)


def test_our_backends_that_need_a_gpu_are_missing_with_their_reason(on_cpu):
    for case in (FEWER, replace(FEWER, T=1)):
        for row in rows(ssd, case, [], ssd.BACKENDS):
            assert row["missing"]
            assert row["us"] is row["roofline"] is row["error"] is None
    for row in rows(causal_conv1d, CONV, [], ["no_such"]):
        assert "has no backend 'no_such'" in row["missing"]


def test_a_wrong_gradient_of_ours_stops_before_the_clock(on_cpu, monkeypatch):
    right = hylo_ops.chunk_ssd

    def wrong_on_cuda(x, dt, *others, backend, **options):
        return right(x, dt.detach() + 0 * dt if backend == "cuda" else dt, *others, backend="reference", **options)

    monkeypatch.setattr(hylo_ops, "chunk_ssd", wrong_on_cuda)
    with pytest.raises(AssertionError, match=r"fewer, forward_backward: error 1.0e\+00 of ddt"):
        rows(ssd, FEWER, [], ["cuda"])


def test_nan_is_a_wrong_peer(on_cpu, libraries, monkeypatch):
    def with_nan(inputs):
        parameters = inputs.weight.sum() + inputs.bias.sum()
        return forms.plain_run(inputs, lambda: (inputs.x * (parameters + torch.nan),), ("y",))

    monkeypatch.setitem(conv_peers.FORMS, "vllm", with_nan)
    for row in rows(causal_conv1d, CONV, ["vllm"]):
        assert "disagrees with float64: relative error inf" in row["peers"]["vllm"]["missing"]


def test_a_long_case_is_compared_on_its_first_tokens_and_must_be_finite_after_them(on_cpu, libraries, monkeypatch):
    def broken_at_the_end(inputs):
        run = right(inputs)
        last = torch.zeros(inputs.dt.shape[1])
        last[64:] = torch.nan

        def forward():
            o, final_state = run.forward()
            return o + last[: o.shape[1], None, None], final_state

        return replace(run, forward=forward)

    right = scan_peers.FORMS["fla"]
    monkeypatch.setattr(ssd, "checked_tokens", lambda case: 64)
    monkeypatch.setitem(scan_peers.FORMS, "vllm_c128", broken_at_the_end)
    for row in rows(ssd, FEWER, ["fla", "vllm_c128"]):
        assert row["checked_T"] == 64
        assert "missing" not in row["peers"]["fla"]
        if row["pass"] == "forward":
            reason = row["peers"]["vllm_c128"]["missing"]
            assert reason == "failed: AssertionError: gives NaN or Inf after the compared tokens"


def test_repeated_inputs_are_made_once_for_all_peers():
    inputs = ssd.draw(FEWER, "trained", "cpu")
    assert inputs.repeated[0] is inputs.repeated[0]
    assert inputs.repeated[0].shape == (2, 70, 4, 32)
    assert inputs.first(70) is inputs
    assert inputs.first(64).repeated[1].shape == (2, 64, 2, 16)
    equal = ssd.draw(EQUAL, "trained", "cpu")
    assert equal.repeated[0].data_ptr() == equal.x.data_ptr()
