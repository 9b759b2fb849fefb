"""The libraries that the benchmarks compare with, as far as they are called: their argument forms over the reference.

What they demand of shapes, strides and dtypes is asserted, so that a call that a GPU would refuse fails here.
"""

import sys
from types import ModuleType

import torch

import hylo_ops


def install(monkeypatch):
    """All of them can be imported until the test ends."""
    for name, functions in _MODULES.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        for function_name, function in functions.items():
            monkeypatch.setattr(sys.modules[name], function_name, function, raising=False)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False, return_final_states=False
):
    assert x.shape[2] == dt.shape[2]
    assert B.shape == C.shape
    assert chunk_size in (128, 256)
    o, final_state = hylo_ops.chunk_ssd(
        *(x, dt, A, B, C),
        d=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=initial_states,
        backend="reference",
    )
    return (o, final_state) if return_final_states else o


def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    heads = D.numel()
    dim, channels = heads * headdim, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([dim, channels, heads], dim=-1)
    xbc, _ = hylo_ops.causal_conv1d(xbc, conv1d_weight, conv1d_bias, activation=activation, backend="reference")
    K = (channels - dim) // ngroups // 2
    x, b, c = xbc.split([dim, ngroups * K, ngroups * K], dim=-1)
    x, b, c = x.unflatten(-1, (heads, headdim)), b.unflatten(-1, (ngroups, K)), c.unflatten(-1, (ngroups, K))
    o, final_state = mamba_chunk_scan_combined(
        x, dt, A, b, c, chunk_size, D, dt_bias, dt_softplus=True, return_final_states=return_final_states
    )
    y = rmsnorm_fn(o.flatten(2), rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    return y, final_state


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    assert weight.shape == x.shape[-1:]
    assert bias is None
    assert z.shape == x.shape
    groups = (-1, group_size)
    shape = (1, -1, weight.numel() // group_size, group_size)
    return hylo_ops.gated_rms_norm(
        *(x.reshape(shape), z.reshape(shape), weight.view(groups)),
        eps=eps,
        norm_before_gate=norm_before_gate,
        backend="reference",
    ).view(x.shape)


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    heads, width, K = state.shape[1:]
    assert x.shape == dt.shape == (state.shape[0], heads, width)
    assert A.shape == (heads, width, K)
    assert D.shape == dt_bias.shape == (heads, width)
    assert B.shape == C.shape
    tied = (dt.stride(2), D.stride(1), dt_bias.stride(1), *A.stride()[1:])
    assert tied == (0,) * 5, "one number of a head was copied to its whole width"
    return hylo_ops.recurrent_ssd(
        *(x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], state),
        d=D[:, 0],
        dt_bias=dt_bias[:, 0],
        dt_softplus=dt_softplus,
        backend="reference",
    )[:, 0]


def _flashinfer_update(state, x, dt, A, B, C, D, z=None, dt_bias=None, dt_softplus=False):
    assert dt.dtype == D.dtype == dt_bias.dtype
    assert x.dtype == B.dtype == C.dtype
    assert state.is_contiguous()
    assert dt.stride(1) == 1
    assert x.stride(1) == x.shape[2]
    assert B.stride(1) == B.shape[2]
    return selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus)


def _vllm_update(state, x, dt, A, B, C, D, dt_bias, z=None, dt_softplus=False, out=None):
    out.copy_(selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus))


def mamba_chunk_scan_combined_varlen(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    cu_seqlens,
    cu_chunk_seqlens,
    last_chunk_indices,
    seq_idx,
    out,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    state_dtype=None,
):
    tables = cu_seqlens, cu_chunk_seqlens, last_chunk_indices, seq_idx
    assert {t.dtype for t in tables} == {torch.int32}
    assert int(cu_chunk_seqlens.diff().max()) <= chunk_size
    torch.testing.assert_close(cu_chunk_seqlens[last_chunk_indices + 1], cu_seqlens[1:])
    torch.testing.assert_close(
        seq_idx, torch.searchsorted(cu_seqlens, cu_chunk_seqlens[:-1], right=True, out_int32=True) - 1
    )
    o, final_state = hylo_ops.chunk_ssd(
        *(x[None], dt[None], A, B[None], C[None]),
        d=D,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=initial_states,
        cu_seqlens=cu_seqlens,
        backend="reference",
    )
    out.copy_(o[0])
    return final_state.to(state_dtype)


def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False):
    """The decay is a step with a = -1, and v what that step writes."""
    assert q.shape == k.shape
    assert q.shape[:3] == v.shape[:3] == g.shape
    assert (g.dtype, scale, output_final_state) == (torch.float32, 1.0, True)
    step, wide = -g, [t.float() for t in (v, k, q)]
    state = None if initial_state is None else initial_state.mT.contiguous()
    o, final_state = hylo_ops.chunk_ssd(
        wide[0] / step[..., None], step, -torch.ones(g.shape[2]), *wide[1:], initial_state=state, backend="reference"
    )
    return o.to(v.dtype), final_state.mT


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    A_log=None,
    dt_bias=None,
    use_beta_sigmoid_in_kernel=False,
    state_v_first=False,
):
    """Only as its own layer calls it: unit vectors and gates are made inside."""
    assert q.dtype == torch.bfloat16, "takes 16-bit inputs only"
    assert all((use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, state_v_first))
    q, k = (torch.nn.functional.normalize(t.float(), dim=-1).to(t.dtype) for t in (q, k))
    g = -A_log.exp() * torch.nn.functional.softplus(g.float() + dt_bias)
    return hylo_ops.chunk_gated_delta_rule(q, k, v, g, beta.float().sigmoid(), backend="reference")


def rms_norm_gated(x, g, weight, bias, eps=1e-6):
    assert (weight.shape, bias) == (x.shape[-1:], None)
    return hylo_ops.gated_rms_norm(x, g, weight, eps=eps, norm_before_gate=True, backend="reference")


def _fla_rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    """The norm in x's dtype, of the sum in the residual's."""
    assert (bias, residual_in_fp32) == (None, False)
    assert prenorm == (residual is not None)
    return hylo_ops.rms_norm(x, weight, eps=eps, residual=residual, backend="reference")


def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
    """As its block calls it: the sum comes with the norm, which is in x's dtype."""
    assert (bias, prenorm, residual_in_fp32, is_rms_norm) == (None, True, True, True)
    if residual is None:
        return hylo_ops.rms_norm(x, weight, eps=eps, backend="reference"), x.float()
    return hylo_ops.rms_norm(x, weight, eps=eps, residual=residual, backend="reference")


def swiglu_linear(x, y, weight, bias):
    assert bias is None
    assert x.dtype == y.dtype
    return torch.nn.functional.linear(torch.nn.functional.silu(x) * y, weight)


def causal_conv1d(x, weight, bias, activation=None, backend=None):
    assert (activation, backend) == ("silu", "triton")
    return hylo_ops.causal_conv1d(x, weight, bias, activation="silu", backend="reference")


def _fla_conv_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    y = hylo_ops.recurrent_causal_conv1d(x, weight, bias, cache, activation=activation, backend="reference")
    return y, cache


def causal_conv1d_fwd_verifier(x, weight):
    return weight.shape[1] <= 4, "Gluon convolution requires a width of 2, 3, or 4"


class GluonBackend:
    @staticmethod
    def is_available():
        return True


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    assert x.stride(1) == 1
    return causal_conv1d(x.mT, weight, bias, activation, "triton")[0].mT


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None):
    y = hylo_ops.recurrent_causal_conv1d(
        x[:, None], weight, bias, conv_state, activation=activation, backend="reference"
    )
    return y[:, 0]


def _vllm_conv(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    null_block_id=0,
    metadata=None,
):
    assert x.stride(0) == 1
    assert conv_states.shape[1:] == (weight.shape[0], weight.shape[1] - 1)
    assert not bool(has_initial_state.any())
    assert null_block_id not in cache_indices.tolist()
    ((size, table),) = metadata.nums_dict.items()
    blocks = [-(-int(length) // size) for length in query_start_loc.diff()]
    assert table["tot"] == sum(blocks)
    assert metadata.batch_ptr.tolist() == [i for i, count in enumerate(blocks) for _ in range(count)]
    assert metadata.token_chunk_offset_ptr.tolist() == [j for count in blocks for j in range(count)]
    y, _ = hylo_ops.causal_conv1d(
        x.mT[None], weight, bias, activation=activation, cu_seqlens=query_start_loc, backend="reference"
    )
    return y[0].mT


def _vllm_conv_update(
    x, conv_state, weight, bias=None, activation=None, conv_state_indices=None, null_block_id=0, out=None
):
    assert conv_state.shape[1:] == (weight.shape[0], weight.shape[1] - 1)
    assert conv_state.stride(1) == 1
    assert null_block_id not in conv_state_indices.tolist()
    state = torch.nn.functional.pad(conv_state, (1, 0))
    out.copy_(causal_conv1d_update(x, state, weight, bias, activation))
    conv_state.copy_(state[..., 1:])
    return out


_VLLM = "vllm.model_executor.layers.mamba.ops"
_MODULES = {
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
    f"{_VLLM}.ssd_combined": {"mamba_chunk_scan_combined_varlen": mamba_chunk_scan_combined_varlen},
    f"{_VLLM}.mamba_ssm": {"selective_state_update": _vllm_update},
    f"{_VLLM}.causal_conv1d": {"causal_conv1d_fn": _vllm_conv, "causal_conv1d_update": _vllm_conv_update},
    f"{_VLLM}.layernorm_gated": {"rms_norm_gated": rmsnorm_fn},
    "flashinfer.mamba": {"selective_state_update": _flashinfer_update},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "fla.modules.fused_norm_gate": {"rms_norm_gated": rms_norm_gated},
    "fla.modules.layernorm": {"rms_norm": _fla_rms_norm},
    "fla.modules.activations": {"swiglu_linear": swiglu_linear},
    "mamba_ssm.ops.triton.layer_norm": {"layer_norm_fn": layer_norm_fn},
    "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
    "fla.modules.causal_conv1d": {"causal_conv1d": causal_conv1d, "causal_conv1d_update": _fla_conv_update},
    "fla.backends": {"GluonBackend": GluonBackend},
    "fla.modules.causal_conv1d.backends.gluon": {"causal_conv1d_fwd_verifier": causal_conv1d_fwd_verifier},
    "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update},
}
