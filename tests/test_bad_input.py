"""Bad input to the program: one sentence that quotes it, exit code 2, nothing written or overwritten."""

import errno
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hylo import HyloForCausalLM, cli
from hylo.errors import UserError
from hylo.upcycle import hybrid_config, upcycle
from tests import tiny


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    tiny.llama().save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def run_upcycle(base, out, monkeypatch, capsys, **options):
    """Exit code and standard error of `hylo upcycle`."""
    values = {"base": base, "mla-layers": "1", "out": out, **options}
    arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["hylo", "upcycle", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def tree(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def shard(directory, drop=True):
    """Split the weights in two files with an index; leave the second away."""
    weights = load_file(directory / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        save_file({name: weights[name] for name in weights if names[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (directory / "model.safetensors").unlink()
    if drop:
        (directory / "model-00002-of-00002.safetensors").unlink()


def drop_weight(directory, name):
    weights = load_file(directory / "model.safetensors")
    del weights[name]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


FAULTS = {
    "architecture": (
        lambda d: edit_config(d, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "'GPT2LMHeadModel'; supported are LlamaForCausalLM, Qwen3ForCausalLM",
    ),
    "attention-bias": (lambda d: edit_config(d, attention_bias=True), "has attention biases (attention_bias"),
    "mlp-bias": (lambda d: edit_config(d, mlp_bias=True), "has MLP biases"),
    "quantised": (lambda d: edit_config(d, quantization_config={"bits": 4}), "has quantised weights"),
    "no-config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config-not-json": (lambda d: (d / "config.json").write_text("{"), "config.json' is not JSON"),
    "config-nonsense": (lambda d: edit_config(d, hidden_size="wide"), "config.json' is not a model configuration"),
    "no-weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors' is missing"),
    "truncated-weights": (lambda d: truncate(d / "model.safetensors", -100), "model.safetensors' is truncated"),
    "truncated-header": (lambda d: truncate(d / "model.safetensors", 300), "model.safetensors' is truncated"),
    "empty-weights": (lambda d: truncate(d / "model.safetensors", 0), "model.safetensors' is truncated"),
    "missing-shard": (shard, "model-00002-of-00002.safetensors' is missing"),
    "broken-index": (
        lambda d: (d / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json' is no index",
    ),
    "missing-weight": (
        lambda d: drop_weight(d, "model.layers.0.mlp.up_proj.weight"),
        "lack 'model.layers.0.mlp.up_proj.weight'",
    ),
    "other-shape": (lambda d: edit_config(d, intermediate_size=50), "cannot load the weights of"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_base(base, tmp_path, monkeypatch, capsys, fault):
    spoil, sentence = FAULTS[fault]
    spoil(base)
    before = tree(tmp_path)
    code, error = run_upcycle(base, tmp_path / "out", monkeypatch, capsys)
    assert code == 2
    assert sentence in error
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert tree(tmp_path) == before


ARGUMENTS = {
    "layer-too-high": ({"mla-layers": "0,2"}, "MLA layer 2 is out of range: the base has layers 0 to 1"),
    "layer-negative": ({"mla-layers": "-1"}, "MLA layer -1 is out of range"),
    "layer-twice": ({"mla-layers": "1,1"}, "MLA layer 1 is named twice"),
    "layer-no-number": ({"mla-layers": "1,x"}, "--mla-layers must be numbers between commas, got '1,x'"),
    "rank-zero": ({"kv-lora-rank": 0}, "kv_lora_rank must be positive, got 0"),
    "rank-negative": ({"q-lora-rank": -3}, "q_lora_rank must be positive, got -3"),
    "rank-too-high": ({"kv-lora-rank": 33}, "kv_lora_rank must be at most 32, the rank of the base's weights, got 33"),
    "rope-odd": ({"qk-rope-head-dim": 3}, "qk_rope_head_dim must be even, got 3"),
    "rope-negative": ({"qk-rope-head-dim": -2}, "qk_rope_head_dim must be positive, got -2"),
    "rope-too-wide": ({"qk-rope-head-dim": 10}, "qk_nope_head_dim must be positive"),
    "base-missing": ({"base": "/no/such/directory"}, "base directory '/no/such/directory' does not exist"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_wrong_arguments(base, tmp_path, monkeypatch, capsys, case):
    options, sentence = ARGUMENTS[case]
    before = tree(tmp_path)
    code, error = run_upcycle(
        **({"base": base, "out": tmp_path / "out"} | options), monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 2
    assert sentence in error
    assert tree(tmp_path) == before


def test_an_output_that_exists_is_left_alone(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("precious")
    before = tree(tmp_path)
    code, error = run_upcycle(base, tmp_path / "out", monkeypatch, capsys)
    assert code == 2
    assert f"output directory '{tmp_path / 'out'}' exists already" in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize("real", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError])
def test_a_full_disk_leaves_nothing_behind(base, tmp_path, monkeypatch, capsys, real):
    """torch and safetensors wrap the system's error in types of their own."""
    fault = real if isinstance(real, OSError) else RuntimeError("I/O error: No space left on device (os error 28)")

    def write_some(self, directory, **_):
        (directory / "model.safetensors").write_bytes(b"half")
        raise fault

    monkeypatch.setattr(HyloForCausalLM, "save_pretrained", write_some)
    before = tree(tmp_path)
    code, error = run_upcycle(base, tmp_path / "out", monkeypatch, capsys)
    assert code == 2
    assert f"no space left on the disk while writing '{tmp_path / 'out'}'" in error
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_sharded_base_is_read(base, tmp_path):
    expected = load_file(base / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    shard(base, drop=False)
    upcycle(base, mixer="gated_deltanet", mla_layers=[0], out=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["model.layers.0.mixer.o_proj.weight"], expected)


def test_the_library_refuses_what_the_command_line_cannot_say(base, tmp_path):
    config = tiny.llama().config
    with pytest.raises(UserError, match="mixer must be one of gated_deltanet, mamba2, got 'mla'"):
        hybrid_config(config, mixer="mla", mla_layers=[0])
    with pytest.raises(UserError, match="unknown dimension 'kv_rank'; known are q_lora_rank,"):
        hybrid_config(config, mixer="mamba2", mla_layers=[0], kv_rank=3)
    with pytest.raises(UserError, match="v_head_dim must be the base's head width 8, got 4"):
        hybrid_config(config, mixer="mamba2", mla_layers=[0], v_head_dim=4)
    with pytest.raises(UserError, match="at most the base's head width 8, got 6 \\+ 4"):
        hybrid_config(config, mixer="mamba2", mla_layers=[0], qk_nope_head_dim=6, qk_rope_head_dim=4)
    with pytest.raises(UserError, match="init must be one of published, aligned, got 'best'"):
        upcycle(base, mixer="mamba2", mla_layers=[0], out=tmp_path / "out", init="best")
    assert not (tmp_path / "out").exists()
