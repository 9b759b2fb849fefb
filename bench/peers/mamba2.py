"""A whole Mamba2 block between its projections in other libraries.

They know no fewer heads of x and b: they get a projection, a convolution and a convolution's state whose channels are
repeated, outside the clock. Gradients of repeated channels are summed in fp32, outside the clock too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.contest import Results
from bench.forms import Form, Inputs, Run, Step, StepForm, Tensors, leaf
from bench.peers import Missing, imported
from bench.peers.causal_conv1d import Update, causal_conv1d_update, vllm_state, vllm_update
from bench.peers.ssd import step_arguments

OUTPUTS = ("y", "final_state")


@dataclass(frozen=True, kw_only=True)
class MixerInputs(Inputs):
    """What every contestant of the block gets. z, xbc and dt lie side by side, as one projection gives them.

    d, dt_bias as in the scan's inputs. Gradients come in of y, in its dtype, and of the final state, fp32.
    """

    DIFFERENTIABLE = ("z", "xbc", "dt", "conv_weight", "conv_bias", "a", "norm_weight", "d", "dt_bias")
    OF_TOKENS = ("z", "xbc", "dt")
    STATES = ("conv_state", "state")

    z: Tensor  # [B, T, H, V]
    xbc: Tensor  # [B, T, D]
    dt: Tensor  # [B, T, H]
    conv_weight: Tensor  # [D, W]
    conv_bias: Tensor  # [D]
    a: Tensor  # [H] fp32
    norm_weight: Tensor  # [NG, H V / NG]
    d: Tensor  # [H] fp32
    dt_bias: Tensor
    conv_state: Tensor | None  # [B, D, W], of a decode step
    state: Tensor | None  # [B, H, V, K]
    d_state: int
    x_heads: int
    b_heads: int
    eps: float

    @property
    def inner(self) -> int:
        return self.z.shape[2] * self.z.shape[3]

    @property
    def groups(self) -> int:
        """Heads of c."""
        of_x_and_b = self.x_heads * self.z.shape[3] + self.b_heads * self.d_state
        return (self.xbc.shape[2] - of_x_and_b) // self.d_state

    @cached_property
    def channels(self) -> Tensor:
        """For each channel of a block whose x and b are repeated, the one of ours that it is."""

        def repeated(begin: int, present: int, wanted: int, width: int) -> Tensor:
            heads = torch.arange(begin, begin + present * width, device=self.xbc.device).view(present, width)
            return heads.repeat_interleave(wanted // present, dim=0).flatten()

        heads, width = self.z.shape[2:]
        of_x, of_b = self.x_heads * width, self.b_heads * self.d_state
        return torch.cat(
            [
                repeated(0, self.x_heads, heads, width),
                repeated(of_x, self.b_heads, self.groups, self.d_state),
                repeated(of_x + of_b, self.groups, self.groups, self.d_state),
            ]
        )

    def folded(self, gradient: Tensor, dim: int) -> Tensor:
        """The gradient of our channels from that of the repeated ones."""
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        shape = list(gradient.shape)
        shape[dim] = self.xbc.shape[2]
        return wide.new_zeros(shape).index_add_(dim, self.channels, wide)

    @cached_property
    def repeated(self) -> dict[str, Tensor]:
        """The projection z | x | b | c | dt and the convolution of the repeated channels."""
        with torch.no_grad():
            parts = self.z.flatten(2), self.xbc[..., self.channels], self.dt
            return {
                "projection": torch.cat(parts, dim=-1),
                "conv_weight": self.conv_weight[self.channels],
                "conv_bias": self.conv_bias[self.channels],
            }


def _mamba_ssm(chunk_size: int, inputs: MixerInputs) -> Run:
    """One autograd node of convolution, scan and norm. Its norm has as many groups as c has heads."""
    block = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_split_conv1d_scan_combined")
    imported("causal_conv1d", "causal_conv1d_fn")  # what it convolves with
    if inputs.norm_weight.shape[0] != inputs.groups:
        raise Missing("norms as many groups as c has heads only")
    of_heads = {"dt_bias": inputs.dt_bias, "a": inputs.a, "d": inputs.d}
    tensors = {**inputs.repeated, **of_heads, "norm_weight": inputs.norm_weight.flatten()}
    leaves = {name: leaf(t, inputs) for name, t in tensors.items()}
    of_output, of_state = inputs.output_gradients

    def forward() -> Tensors:
        projection, conv_weight, conv_bias, dt_bias, a, d, norm_weight = leaves.values()
        return block(
            *(projection, conv_weight, conv_bias, dt_bias, a, d, chunk_size),
            return_final_states=True,
            activation="silu",
            rmsnorm_weight=norm_weight,
            rmsnorm_eps=inputs.eps,
            headdim=inputs.z.shape[3],
            ngroups=inputs.groups,
            norm_before_gate=False,
        )

    def gradients(found: Tensors) -> Results:
        named = dict(zip(leaves, found, strict=True))
        heads = inputs.dt.shape[2]
        sizes = [inputs.inner, inputs.channels.numel(), heads]
        of_z, of_xbc, of_dt = named.pop("projection").split(sizes, dim=-1)
        ours = {
            **named,
            "z": of_z.unflatten(-1, inputs.z.shape[2:]),
            "xbc": inputs.folded(of_xbc, 2),
            "dt": of_dt,
            "conv_weight": inputs.folded(named["conv_weight"], 0),
            "conv_bias": inputs.folded(named["conv_bias"], 0),
            "norm_weight": named["norm_weight"].view(inputs.norm_weight.shape),
        }
        return {f"d{name}": ours[name] for name in inputs.DIFFERENTIABLE}

    return Run(
        forward=forward,
        leaves=tuple(leaves.values()),
        output_gradients=(of_output.flatten(2), of_state),
        outputs=lambda outputs: {"y": outputs[0].view(inputs.z.shape), "final_state": outputs[1]},
        gradients=gradients,
    )


FORMS: dict[str, Form] = {
    "mamba_ssm_c128": partial(_mamba_ssm, 128),
    "mamba_ssm_c256": partial(_mamba_ssm, 256),
}


def _sequence(
    inputs: MixerInputs,
    convolve: Update,
    conv_state: Tensor,
    scan: Callable[..., Tensor],
    norm: Callable[..., Tensor],
) -> Step:
    """A library's kernels one after the other: convolution, state update with its softplus, gated norm.

    Args:
        conv_state: of the repeated channels, as `convolve` has it.
        scan: takes the state and the arguments of selective_state_update.
    """
    state = inputs.state
    assert state is not None
    heads, width = inputs.z.shape[2:]
    groups, K = inputs.groups, inputs.d_state
    sizes = [heads * width, groups * K, groups * K]
    projected = inputs.repeated["projection"][:, 0]
    z, xbc, dt = projected.split([inputs.inner, sum(sizes), heads], dim=-1)
    weight = inputs.norm_weight.flatten()
    options: dict[str, Any] = {
        "eps": inputs.eps,
        "group_size": inputs.norm_weight.shape[1],
        "norm_before_gate": False,
    }

    def forward() -> Tensors:
        x, b, c = convolve(xbc, conv_state).split(sizes, dim=-1)
        x, b, c = x.unflatten(-1, (heads, width)), b.unflatten(-1, (groups, K)), c.unflatten(-1, (groups, K))
        o = scan(state, **step_arguments(x, dt, inputs.a, b, c, inputs.d, inputs.dt_bias))
        return norm(o.flatten(1), weight, None, z=z, **options), conv_state, state

    def outputs(found: Tensors) -> Tensors:
        y, conv_state, state = found
        columns = inputs.conv_weight.shape[1] - 1
        ours = conv_state.new_empty(conv_state.shape[0], inputs.xbc.shape[2], columns)
        ours[:, inputs.channels] = conv_state[..., -columns:]
        return y.view(inputs.z.shape), ours, state

    return Step(forward, outputs)


def _repeated_conv_state(inputs: MixerInputs) -> Tensor:
    assert inputs.conv_state is not None
    return inputs.conv_state[:, inputs.channels]


def _mamba_ssm_step(inputs: MixerInputs) -> Step:
    scan = imported("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    norm = imported("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    convolve = causal_conv1d_update(inputs.repeated["conv_weight"], inputs.repeated["conv_bias"])
    return _sequence(inputs, convolve, _repeated_conv_state(inputs), partial(scan, dt_softplus=True), norm)


def _with_vllm(inputs: MixerInputs, scan: Callable[..., Tensor]) -> Step:
    norm = imported("vllm.model_executor.layers.mamba.ops.layernorm_gated", "rms_norm_gated")
    xbc = inputs.xbc.new_empty(inputs.xbc.shape[0], inputs.channels.numel())
    convolve = vllm_update(inputs.repeated["conv_weight"], inputs.repeated["conv_bias"], xbc)
    return _sequence(inputs, convolve, vllm_state(_repeated_conv_state(inputs)), scan, norm)


def _vllm_step(inputs: MixerInputs) -> Step:
    function = imported("vllm.model_executor.layers.mamba.ops.mamba_ssm", "selective_state_update")
    out = inputs.z.new_empty(inputs.z.shape[0], *inputs.z.shape[2:])

    def scan(state: Tensor, **arguments: Tensor) -> Tensor:
        function(state, **arguments, dt_softplus=True, out=out)
        return out

    return _with_vllm(inputs, scan)


def _flashinfer_step(inputs: MixerInputs) -> Step:
    """Its state update between vLLM's convolution and norm; it wants one dtype of dt, D and dt_bias."""
    function = imported("flashinfer.mamba", "selective_state_update")
    of_heads = {
        name: vector.to(inputs.dt.dtype)[:, None].expand(-1, inputs.z.shape[3])
        for name, vector in (("D", inputs.d), ("dt_bias", inputs.dt_bias))
    }

    def scan(state: Tensor, **arguments: Tensor) -> Tensor:
        return function(state, **{**arguments, **of_heads}, dt_softplus=True)

    return _with_vllm(inputs, scan)


STEPS: dict[str, StepForm] = {"mamba_ssm": _mamba_ssm_step, "vllm": _vllm_step, "flashinfer": _flashinfer_step}
