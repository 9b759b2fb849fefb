"""The benchmark's command line and its rows, without a GPU: the clocks are replaced, everything else is real."""

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hylo_ops
from bench import __main__ as command
from bench import (
    causal_conv1d,
    cold,
    contest,
    forms,
    gated_delta_rule,
    gated_rms_norm,
    mla_absorb,
    peers,
    record,
    shapes,
    ssd,
    timing,
)
from bench.contest import Roofs, Work
from bench.peers import gated_delta_rule as delta_peers

CASE = gated_rms_norm.CASES["mamba2-1b-decode-64"]
TIMES = {"us": 20.0, "graph_us": 4.0}
ROOFS = Roofs(bytes_per_second=1e12, flop_per_second=1e15)


@pytest.fixture
def clocks(monkeypatch):
    """Clocks that return fixed numbers: ours TIMES, a peer longer ones."""
    others = {"us": 30.0, "graph_us": 12.0}
    ours = ("reference", "cuda", "triton")
    monkeypatch.setattr(
        timing, "rotate", lambda calls, seconds: {name: dict(TIMES if name in ours else others) for name in calls}
    )
    monkeypatch.setattr(timing, "host_us", lambda call: 7.5)
    monkeypatch.setattr(timing, "peak_bytes", lambda call: 123)


@pytest.fixture
def on_cpu(monkeypatch, clocks):
    """Inputs on the CPU, every backend the reference."""
    public, draw = hylo_ops.gated_rms_norm, gated_rms_norm.draw

    def reference(x, gate, weight, **keywords):
        return public(x, gate, weight, **{**keywords, "backend": "reference"})

    monkeypatch.setattr(hylo_ops, "gated_rms_norm", reference)
    monkeypatch.setattr(gated_rms_norm, "draw", lambda case: draw(case, "cpu"))


def norm_rows(*chosen_peers, case=CASE):
    return json.loads(json.dumps(gated_rms_norm.run(case, ["cuda"], list(chosen_peers), ROOFS)))


def norm_row(*chosen_peers):
    (row,) = norm_rows(*chosen_peers)
    return row


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_without_a_gpu_one_sentence(tmp_path):
    with pytest.raises(command.BadArgument, match="need an NVIDIA GPU"):
        command.main(["gated_rms_norm", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "there is no benchmark 'no_such_op'"),
        (["gated_rms_norm", "--case", "gdn-1b-8k", "huge"], "there is no case 'huge'"),
        (["gated_rms_norm", "--peers", "flash"], "there is no peer 'flash'"),
        (["gated_delta_rule", "--peers", "fla,flash_qla,flash"], "there is no peer 'flash'; there are fla, flash_qla,"),
        (["gated_delta_rule", "--backend", "cuda", "hip"], "there is no backend 'hip'; there are cuda, triton"),
    ],
)
def test_unknown_names_are_quoted(arguments, message):
    with pytest.raises(command.BadArgument, match=message):
        command.main(arguments)


def test_an_option_given_twice_adds_names():
    parsed = command.parse(["ssd", "--case", "a", "b", "--case", "c", "--peers", "fla", "--peers"])
    assert (parsed.case, parsed.peers, parsed.backend) == (["a", "b", "c"], ["fla"], None)


def test_names_come_apart_or_with_commas():
    known = ["fla", "flash_qla", "flashinfer"]
    for written in (["fla,flashinfer"], ["fla", "flashinfer"], ["fla,", "flashinfer"]):
        assert command.choose("peer", written, known) == ["fla", "flashinfer"]
    assert command.choose("peer", [], known) == []
    assert command.choose("peer", None, known) == known


def test_a_row_counts_and_compares(on_cpu):
    row = norm_row("torch", "mamba_ssm")
    assert row["shape"] == {"B": 64, "T": 1, "H": 32, "V": 64}
    assert row["pass"] == "decode"
    assert row["bytes"] == (3 * 64 * 32 * 64 + 32 * 64) * 2
    assert row["roofline"] == pytest.approx(row["bytes"] / 4e-6 / 1e12)
    assert (row["mode"], row["best_peer"], row["ratio"]) == ("graph", "torch", pytest.approx(3.0))
    assert row["peers"]["torch"]["error"] < 1e-2
    assert (row["us"], row["graph_us"], row["host_us"]) == (20.0, 4.0, 7.5)


def test_the_norm_has_its_gradients_too(on_cpu):
    case = replace(CASE, B=2, T=3)
    forward, both = norm_rows("torch", "fla", case=case)
    assert (forward["pass"], both["pass"]) == ("forward", "forward_backward")
    assert set(forward["errors"]) == {"y"}
    assert set(both["errors"]) == set(both["peers"]["torch"]["errors"]) == {"dx", "dgate", "dweight"}
    elements, weights = 2 * 3 * 32 * 64, 32 * 64
    assert (forward["bytes"], both["bytes"]) == (2 * (3 * elements + weights), 2 * (8 * elements + 3 * weights))
    assert (forward["host_us"], both["host_us"]) == (7.5, None)


def zeros(inputs):
    return forms.plain_run(inputs, lambda: (torch.zeros_like(inputs.x),), ("y",))


def test_a_wrong_peer_is_not_compared(on_cpu, monkeypatch):
    monkeypatch.setitem(gated_rms_norm.PEERS, "torch", zeros)
    row = norm_row("torch")
    assert "disagrees with float64" in row["peers"]["torch"]["missing"]
    assert row["ratio"] is None


def test_a_missing_and_a_broken_peer_are_named(on_cpu, monkeypatch):
    def broken(inputs):
        raise OSError("cannot load its library")

    monkeypatch.setitem(gated_rms_norm.PEERS, "torch", broken)
    row = norm_row("torch", "fla")
    assert "cannot load its library" in row["peers"]["torch"]["missing"]
    assert row["peers"]["fla"]["missing"]


def test_a_peer_that_breaks_at_full_size_is_named(on_cpu, monkeypatch):
    def torch_at_full_size(inputs):
        def forward():
            calls.append("forward")
            if len(calls) > 1:  # the first is the check
                raise MemoryError("no memory for it")
            return (hylo_ops.gated_rms_norm(inputs.x, inputs.gate, inputs.weight, eps=1e-5, norm_before_gate=False),)

        return forms.plain_run(inputs, forward, ("y",))

    calls = []
    monkeypatch.setattr(timing, "peak_bytes", lambda call: call() and 123)
    monkeypatch.setitem(gated_rms_norm.PEERS, "torch", torch_at_full_size)
    row = norm_row("torch")
    assert "no memory for it" in row["peers"]["torch"]["missing"]
    assert (row["best_peer"], row["us"]) == (None, 20.0)


def test_no_memory_for_ours_is_a_reason_too(on_cpu, monkeypatch):
    def peak_bytes(call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    monkeypatch.setattr(timing, "peak_bytes", peak_bytes)
    row = norm_row("torch")
    assert "Tried to allocate 90 GiB" in row["missing"]
    assert "Tried to allocate 90 GiB" in row["peers"]["torch"]["missing"]
    assert row["us"] is row["ratio"] is None


def test_our_own_wrong_result_stops_before_the_clock(on_cpu, monkeypatch):
    right = hylo_ops.gated_rms_norm

    def wrong_in_cuda(*tensors, backend, **keywords):
        return right(*tensors, backend=backend, **keywords) * (2 if backend == "cuda" else 1)

    monkeypatch.setattr(hylo_ops, "gated_rms_norm", wrong_in_cuda)
    monkeypatch.setattr(timing, "rotate", lambda calls, seconds: pytest.fail("timed a wrong result"))
    with pytest.raises(AssertionError, match="mamba2-1b-decode-64, forward, y: error"):
        norm_row()


@pytest.fixture
def gpu_of_paper(monkeypatch):
    """Enough of a GPU for the command; what a case gives is one row."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Paper")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(timing, "product_flop_rate", lambda: 1e15)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(command, "show", lambda rows: None)
    monkeypatch.setattr(
        gated_delta_rule, "run", lambda case, backends, chosen, roofs: [{"case": case.name, "peers": chosen}]
    )


def written(folder):
    return json.loads((folder / "gated_delta_rule.json").read_text())


def run_cases(folder, *cases, commit="abc", more=()):
    command.main(["gated_delta_rule", "--out", str(folder), "--commit", commit, "--case", *cases, *more])


def test_parts_of_a_benchmark_are_put_together(gpu_of_paper, monkeypatch, tmp_path):
    run_cases(tmp_path, "d128-8k", "d64-8k")
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: pytest.fail("measured the roof anew"))
    run_cases(tmp_path, "d64-8k", "hylo-1b-8k", more=["--append", "--peers", "fla"])
    result = written(tmp_path)
    assert {row["case"]: row["peers"] == ["fla"] for row in result["rows"]} == {
        "d128-8k": False,
        "d64-8k": True,
        "hylo-1b-8k": True,
    }
    assert result["meta"]["copy_bytes_per_second"] == 1e12
    with pytest.raises(command.BadArgument, match="is of abc on NVIDIA Paper, this run is of def on NVIDIA Paper"):
        run_cases(tmp_path, "d64-8k", commit="def", more=["--append"])


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            AssertionError("d64-8k, backward: error 1.0e+00 of dg"),
            "d64-8k: wrong: d64-8k, backward: error 1.0e+00 of dg",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nA hint"), "d64-8k: does not fit: CUDA out of memory."),
    ],
)
def test_a_case_that_fails_ends_alone(gpu_of_paper, monkeypatch, tmp_path, capsys, problem, said):
    def run(case, *_):
        yield {"case": case.name, "pass": "forward"}
        if case.name == "d64-8k":
            raise problem

    monkeypatch.setattr(gated_delta_rule, "run", run)
    wrong = isinstance(problem, AssertionError)
    with pytest.raises(SystemExit, match="our results are wrong in d64-8k") if wrong else nullcontext():
        run_cases(tmp_path, "d64-8k", "d128-8k")
    assert [row["case"] for row in written(tmp_path)["rows"]] == ["d64-8k", "d128-8k"]
    assert said + "\n" in capsys.readouterr().err


def test_extra_cases_run_by_name_only(gpu_of_paper, tmp_path):
    command.main(["gated_delta_rule", "--out", str(tmp_path), "--commit", "abc"])
    assert [row["case"] for row in written(tmp_path)["rows"]] == list(gated_delta_rule.CASES)
    run_cases(tmp_path, "hylo-1b-length-1024k")
    assert [row["case"] for row in written(tmp_path)["rows"]] == ["hylo-1b-length-1024k"]


def test_eager_mode_where_a_side_is_not_captured():
    entries = {"a": {"us": 50.0, "graph_us": None}, "b": {"missing": "not installed"}}
    assert contest.comparison(TIMES, entries) == {"mode": "eager", "best_peer": "a", "ratio": 2.5}


def test_fla_is_refused_where_it_has_no_such_form():
    with pytest.raises(peers.Missing):
        gated_rms_norm.PEERS["fla"](gated_rms_norm.draw(CASE, "cpu"))


def test_the_higher_of_two_floors_counts():
    assert Work(bytes=10**9, flop=10**9).floor_us(ROOFS) == pytest.approx(1000)
    assert Work(bytes=10**6, flop=10**12).floor_us(ROOFS) == pytest.approx(1000)


@pytest.mark.parametrize(
    ("sweep_us", "expected"), [(10, (20, 20)), (500, (20, 20)), (2_000, (20, 12)), (50_000, (10, 1)), (10**6, (5, 1))]
)
def test_long_calls_get_fewer_rounds(sweep_us, expected):
    assert timing.plan(sweep_us, seconds=1.0) == expected


def test_nobody_to_time():
    assert timing.rotate({}, seconds=1.0) == {}


# (B, T, G, H, K, V) of issue 3's table
HYLO = [(1, 8192, 6), (4, 8192, 6), (1, 65536, 6), (1, 8192, 9), (1, 65536, 9)]
CHUNKED = [(B, T, H, H, 256, 512) for B, T, H in HYLO] + [
    (1, 8192, 16, 16, 128, 128),
    (1, 32768, 16, 16, 128, 128),
    (8, 4096, 16, 16, 128, 128),
    (1, 65536, 16, 32, 128, 128),
    (4, 8192, 16, 16, 128, 128),
    (1, 8192, 32, 32, 64, 64),
    (1, 65536, 8, 8, 256, 256),
]
DECODED = [(B, 1, *dims) for dims in ((16, 32, 128, 128), (6, 6, 256, 512)) for B in (1, 32, 256)]


def test_the_delta_rule_has_every_case_of_the_bar():
    cases = gated_delta_rule.CASES.values()
    plain = [tuple(case.shape.values()) for case in cases if case.T > 1 and not case.initial_state]
    assert plain == CHUNKED
    for state_dtype in (torch.float32, torch.bfloat16):
        found = [tuple(case.shape.values()) for case in cases if case.T == 1 and case.state_dtype == state_dtype]
        assert found == DECODED
    assert {case.passes for case in cases if case.T > 1} == {("forward", "backward")}
    assert {case.passes for case in cases if case.T == 1} == {("decode",)}
    assert {case.dtype for case in cases} == {torch.bfloat16}
    assert {"fla", "flash_qla", "flashinfer"} <= set(gated_delta_rule.PEERS)
    assert gated_delta_rule.GATES == {"fast": 1.0, "slow": 0.01}


def test_lengths_grow_from_4k_to_1m_at_the_hylo_shape():
    cases = shapes.GATED_DELTA_RULE_LENGTHS
    assert [case.T for case in cases] == [4**n * 1024 for n in range(1, 6)]
    assert {(case.B, case.H, case.K, case.V) for case in cases} == {(1, 6, 256, 512)}
    assert not {case.name for case in cases} & gated_delta_rule.CASES.keys()


def test_work_of_the_delta_rule_by_hand():
    """K = V = 128, 16 heads, 8192 tokens: 167 and 475 kFLOP a token and head; the final state is 1 MiB."""
    case = gated_delta_rule.CASES["d128-8k"]
    forward, backward = (gated_delta_rule.work(case, pass_) for pass_ in ("forward", "backward"))
    assert forward.flop == 8192 * 16 * (98304 + 65536 + 2730)
    assert backward.flop == 8192 * 16 * (294912 + 163840 + 16384)
    assert forward.bytes == 8192 * (4 * 2048 * 2 + 8 * 16) + 2**20
    assert backward.bytes == 8192 * (2 * 7 * 2048 + 16 * 16) + 2**20
    # one token of 32 sequences: 64 MiB of states read and written, 7 FLOP an element; 16 query-key and 32 value heads
    decode = gated_delta_rule.work(gated_delta_rule.CASES["d128-gva-decode-32"], "decode")
    assert decode.flop == 7 * 32 * 32 * 128 * 128
    assert decode.bytes == 2 * 64 * 2**20 + 32 * (4 * 128 * 48 + 8 * 32)
    # a state to begin with: read in the forward; in the backward read again, and its gradient written
    with_state = gated_delta_rule.CASES["d128-8k-state"]
    assert gated_delta_rule.work(with_state, "forward").bytes == forward.bytes + 2**20
    assert gated_delta_rule.work(with_state, "backward").bytes == backward.bytes + 2 * 2**20


def test_the_float64_check_fits_the_memory():
    for case in (*gated_delta_rule.CASES.values(), *gated_delta_rule.EXTRA_CASES.values()):
        tokens = gated_delta_rule.checked_tokens(case)
        assert gated_delta_rule.exact_bytes(replace(case, T=tokens)) <= gated_delta_rule.MAX_EXACT_BYTES
        assert tokens == case.T or (tokens % 64 == 0 and tokens > 20_000)


TINY = replace(gated_delta_rule.CASES["d128-8k"], name="tiny", B=2, T=70, G=1, H=2, K=16, V=32)


@pytest.fixture
def delta_on_cpu(monkeypatch, clocks):
    draw = gated_delta_rule.draw
    monkeypatch.setattr(gated_delta_rule, "draw", lambda case, gates: draw(case, gates, device="cpu"))


def delta_rows(case, backends=("reference",), chosen_peers=()):
    return json.loads(json.dumps(list(gated_delta_rule.run(case, list(backends), list(chosen_peers), ROOFS))))


def test_gates_activated_inside_a_kernel_are_the_same():
    case = replace(TINY, T=1)
    for gates, scale in gated_delta_rule.GATES.items():
        x = gated_delta_rule.draw(case, gates, device="cpu")
        g = -x.a_log.double().exp() * torch.nn.functional.softplus(x.a.double() + x.dt_bias.double())
        torch.testing.assert_close(x.g.double(), g, rtol=1e-6, atol=0)
        torch.testing.assert_close(x.beta.double(), x.b.double().sigmoid(), rtol=1e-6, atol=0)
        assert x.g.max() < 0
        assert scale * 1e-3 < -x.g.median() < scale * 0.2


def test_rows_of_every_pass_and_gate_set(delta_on_cpu):
    names = ["fla", "flash_qla", "flashinfer"]
    rows = delta_rows(replace(TINY, initial_state=True), chosen_peers=names)
    rows += delta_rows(replace(TINY, B=1, T=1), chosen_peers=names)
    found = [(row["gates"], row["pass"]) for row in rows]
    assert found == [
        *(("fast", "forward"), ("fast", "backward"), ("slow", "forward"), ("slow", "backward")),
        *(("fast", "decode"), ("slow", "decode")),
    ]
    outputs = {"o", "final_state"}
    for row in rows:
        backward = row["pass"] == "backward"
        assert set(row["errors"]) == ({"dq", "dk", "dv", "dg", "dbeta", "dstate"} if backward else outputs)
        assert row["error"] == max(row["errors"].values()) < 5e-3
        assert row["checked_T"] == row["shape"]["T"]
        assert row["host_us"] == (7.5 if row["pass"] == "decode" and row["gates"] == "fast" else None)
        assert (row["peak_bytes"], row["backend"], row["state_dtype"]) == (123, "reference", "fp32")
        assert row["peers"].keys() == set(names)
        assert all(entry["missing"] for entry in row["peers"].values())


def test_a_backend_that_cannot_run_is_missing_with_its_reason(delta_on_cpu):
    for case in (TINY, replace(TINY, T=1)):
        for row in delta_rows(case, backends=("cuda", "triton")):
            assert row["missing"]
            assert row["us"] is row["roofline"] is row["ratio"] is row["error"] is None
        command.show(delta_rows(case, backends=("cuda", "reference"), chosen_peers=["fla"]))


def test_a_peer_of_the_delta_rule_is_compared_in_every_pass(delta_on_cpu, monkeypatch):
    for pass_, form in gated_delta_rule.OURS.items():
        monkeypatch.setitem(delta_peers.FORMS[pass_], "fla", lambda x, form=form: form("reference", x))
    for row in (*delta_rows(TINY, chosen_peers=["fla"]), *delta_rows(replace(TINY, T=1), chosen_peers=["fla"])):
        assert (row["best_peer"], row["ratio"]) == ("fla", pytest.approx(3.0))
        assert row["peers"]["fla"]["errors"] == row["errors"]


def test_a_long_case_is_checked_on_its_first_tokens(delta_on_cpu, monkeypatch):
    monkeypatch.setattr(gated_delta_rule, "checked_tokens", lambda case: 64)
    assert {row["checked_T"] for row in delta_rows(TINY)} == {64}


def test_a_wrong_gradient_of_ours_stops_before_the_clock(delta_on_cpu, monkeypatch):
    right = gated_delta_rule.our_chunk

    def wrong(backend, x):
        return right(backend, x if backend == "reference" else replace(x, g=x.g.detach() + 0 * x.g))

    monkeypatch.setitem(gated_delta_rule.OURS, "backward", wrong)
    monkeypatch.setattr(hylo_ops, "chunk_gated_delta_rule", reference_always(hylo_ops.chunk_gated_delta_rule))
    with pytest.raises(AssertionError, match=r"tiny, backward: error 1.0e\+00 of dg"):
        delta_rows(TINY, backends=["cuda"])


def reference_always(function):
    return lambda *tensors, backend, **keywords: function(*tensors, backend="reference", **keywords)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is here")
def test_cold_starts_without_a_gpu_are_one_sentence(capsys):
    assert cold.main(["gated_delta_rule"]) == 2
    assert capsys.readouterr().err == "error: cold starts need an NVIDIA GPU, and torch finds none here\n"


@pytest.mark.parametrize(
    ("stem", "case"),
    [
        ("gated_delta_rule", replace(TINY, B=1)),
        ("ssd", replace(ssd.CASES["hylo-1b-8k"], T=70, G=4, H=4, K=16, V=32, HX=2, GB=1)),
        ("causal_conv1d", replace(causal_conv1d.CASES["d2304-8k"], T=9, D=12)),
        ("mla_absorb", replace(mla_absorb.CASES["hylo-1b-1x4k"], S=70, H=4, R=32)),
    ],
    ids=["gated_delta_rule", "ssd", "causal_conv1d", "mla_absorb"],
)
def test_a_cold_start_is_a_forward_and_a_backward(stem, case):
    start = cold.Start(case, "reference", packaged=True, limit=1.0)
    found = cold.measure(stem, start, device="cpu")
    assert found["seconds"] == pytest.approx(found["forward_seconds"] + found["backward_seconds"])
    assert min(found.values()) > 0


def test_a_cold_start_without_packaged_cubins_finds_none(monkeypatch):
    monkeypatch.setattr(hylo_ops.cubin, "packaged_path", hylo_ops.cubin.packaged_path)  # put back after the test
    start = replace(cold.STARTS["gated_delta_rule"]["nvrtc"], case=TINY)
    assert "missing" in cold.measure("gated_delta_rule", start, device="cpu")
    assert not hylo_ops.cubin.packaged_path(hylo_ops.cubin.Spec("gated_delta_rule", (("K", 128),))).exists()


def test_each_cold_start_is_a_fresh_process_without_caches(monkeypatch):
    def run(command, env, **_):
        caches = [Path(env[name]) for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR")]
        assert not any(cache.exists() for cache in caches)
        assert os.environ.items() - env.items() <= {
            (name, os.environ.get(name)) for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR")
        }
        assert command[1:] == ["-m", "bench.cold", "gated_delta_rule", "--only", "triton"]
        return answers.pop()

    class Answer:
        def __init__(self, returncode, stdout="", stderr=""):
            self.returncode, self.stdout, self.stderr = returncode, stdout, stderr

    answers = [
        Answer(1, stderr="Traceback\nRuntimeError: no kernel image"),
        Answer(0, stdout='a warning\n{"seconds": 9.5}\n'),
    ]
    monkeypatch.setattr(cold.subprocess, "run", run)
    assert cold.row("gated_delta_rule", "triton", cold.in_fresh_process("gated_delta_rule", "triton")) == {
        "case": "d128-1k",
        "shape": {"B": 1, "T": 1024, "G": 16, "H": 16, "K": 128, "V": 128},
        "dtype": "bf16",
        "pass": "forward_backward",
        "backend": "triton",
        "start": "triton",
        "seconds": 9.5,
        "limit_seconds": 30.0,
    }
    assert cold.in_fresh_process("gated_delta_rule", "triton") == {"missing": "failed: RuntimeError: no kernel image"}


def test_what_a_result_says_of_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Paper")
    meta = record.meta("abc")
    assert (meta["commit"], meta["gpu"]) == ("abc", "NVIDIA Paper")
    assert meta["versions"].keys() >= {"python", "cuda", "torch"}
