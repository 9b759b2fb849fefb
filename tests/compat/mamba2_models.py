"""Tiny random models of transformers with Mamba2 mixers, and a switch that puts them on our functions."""

import inspect

import pytest
import torch
from transformers import BambaConfig, BambaForCausalLM, Mamba2Config, Mamba2ForCausalLM, Zamba2Config, Zamba2ForCausalLM
from transformers.models.bamba import modeling_bamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba2 import modeling_zamba2

from hylo_ops.compat import causal_conv1d, mamba_ssm

VOCAB = 96
OURS = {
    "mamba2_chunk_scan": mamba_ssm.mamba_chunk_scan_combined,
    "mamba2_selective_state_update": mamba_ssm.selective_state_update,
    "causal_conv1d_fn": causal_conv1d.causal_conv1d_fn,
    "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
}
MODULES = {"mamba2": modeling_mamba2, "bamba": modeling_bamba, "zamba2": modeling_zamba2}
MIXERS = {"mamba2": 2, "bamba": 2, "zamba2": 3}  # layers of each model that have one


def make(name):
    torch.manual_seed(0)
    model = {"mamba2": _mamba2, "bamba": _bamba, "zamba2": _zamba2}[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("dt_bias", "D", "conv1d.bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # no two alike, none zero
    return model.eval()


def eager(name):
    """The model's functions on plain PyTorch, also where the libraries that it prefers are installed."""
    module = MODULES[name]
    plain = {function: inspect.unwrap(getattr(module, function)) for function in OURS}
    assert all(function.__globals__ is vars(module) for function in plain.values())
    return plain


def on_each_device():
    """The CPU, and a GPU where there is one."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    return pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, skip])])


def _mamba2():
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=MIXERS["mamba2"],
            num_heads=4,
            head_dim=16,
            state_size=16,
            n_groups=2,
            chunk_size=32,
            time_step_limit=(0.001, 0.5),
        )
    )


def _bamba():
    return BambaForCausalLM(
        BambaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=MIXERS["bamba"] + 1,
            attn_layer_indices=[1],
            num_attention_heads=2,
            num_key_value_heads=1,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_n_groups=1,
            mamba_chunk_size=32,
        )
    )


def _zamba2():
    return Zamba2ForCausalLM(
        Zamba2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=MIXERS["zamba2"],
            layers_block_type=["mamba", "hybrid", "mamba"],
            num_attention_heads=2,
            num_key_value_heads=2,
            n_mamba_heads=4,
            mamba_headdim=16,
            mamba_d_state=16,
            mamba_ngroups=2,
            chunk_size=32,
            num_mem_blocks=1,
            use_shared_attention_adapter=False,
            adapter_rank=8,
        )
    )
