"""The short causal convolution in other libraries, all with a bias and silu. They give y and no last state."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.forms import Form, Inputs, Run, Step, StepForm, Tensors, plain_run
from bench.peers import Missing, imported
from hylo_ops.causal_conv1d import reference

OUTPUTS = ("y",)
_VLLM_OPS = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
_NO_SLOT_IS_PADDING = -1  # vLLM's is 0


@dataclass(frozen=True, kw_only=True)
class ConvInputs(Inputs):
    """What every contestant of the convolution gets; the gradient of y comes in in its dtype."""

    DIFFERENTIABLE = ("x", "weight", "bias")
    OF_TOKENS = ("x",)
    STATES = ("state",)

    x: Tensor  # [B, T, D]
    weight: Tensor  # [D, W]
    bias: Tensor  # [D]
    state: Tensor | None  # [B, D, W], of a decode step


def newest(state: Tensor) -> Tensor:
    """[B, D, W - 1] of [B, D, W]: what the next token needs, which is all that some libraries keep."""
    return state[..., 1:]


def _torch(inputs: ConvInputs) -> Run:
    i, tokens = inputs, inputs.x.shape[1]
    channels, width = inputs.weight.shape

    def forward() -> Tensors:
        y = F.conv1d(i.x.mT, i.weight[:, None], i.bias, padding=width - 1, groups=channels)
        return (F.silu(y[..., :tokens]).mT,)

    return plain_run(inputs, forward, OUTPUTS)


def _causal_conv1d(inputs: ConvInputs) -> Run:
    """[B, D, T] whose channels lie side by side."""
    convolve = imported("causal_conv1d", "causal_conv1d_fn")
    i = inputs
    return plain_run(inputs, lambda: (convolve(i.x.mT, i.weight, i.bias, activation="silu").mT,), OUTPUTS)


def _fla(gluon: bool, inputs: ConvInputs) -> Run:
    """One of the two languages that fla has this kernel in; it asks a variable which, at every call."""
    convolve = imported("fla.modules.causal_conv1d", "causal_conv1d")
    if gluon:
        _demand_gluon(inputs)
    i, switch = inputs, str(int(gluon))

    def forward() -> Tensors:
        os.environ["FLA_CONV_GLUON"] = switch
        return (convolve(i.x, i.weight, i.bias, activation="silu", backend="triton")[0],)

    return plain_run(inputs, forward, OUTPUTS)


def _demand_gluon(inputs: ConvInputs) -> None:
    """Raises Missing where fla would silently take the other language."""
    if not imported("fla.backends", "GluonBackend").is_available():
        raise Missing("fla has no gluon here")
    verify = imported("fla.modules.causal_conv1d.backends.gluon", "causal_conv1d_fwd_verifier")
    accepted, reason = verify(x=inputs.x, weight=inputs.weight)
    if not accepted:
        raise Missing(reason)


def _vllm(inputs: ConvInputs) -> Run:
    """Packed sequences and the tables of what each program does, which an engine makes once for all layers."""
    if inputs.wants_gradients:
        raise Missing("has no backward")
    convolve = imported(_VLLM_OPS, "causal_conv1d_fn")
    batch, tokens, channels = inputs.x.shape
    bounds, slots = (torch.arange(n, dtype=torch.int32, device=inputs.x.device) for n in (batch + 1, batch))
    options = {
        "conv_states": vllm_state(inputs.x.new_zeros(batch, channels, inputs.weight.shape[1])),
        "query_start_loc": bounds * tokens,
        "cache_indices": slots,
        "has_initial_state": torch.zeros(batch, dtype=torch.bool, device=inputs.x.device),
        "null_block_id": _NO_SLOT_IS_PADDING,
        "metadata": _vllm_programs(batch, tokens, inputs.x.device),
    }
    flat = inputs.x.flatten(0, 1).mT

    def forward() -> Tensors:
        y = convolve(flat, inputs.weight, inputs.bias, activation="silu", **options)
        return (y.mT.view(inputs.x.shape),)

    return plain_run(inputs, forward, OUTPUTS)


def _vllm_programs(batch: int, tokens: int, device: torch.device) -> SimpleNamespace:
    """Which sequence each program works on, and which of its blocks of 8 tokens."""
    size = 8
    blocks = -(-tokens // size)
    numbers = partial(torch.arange, dtype=torch.int32, device=device)
    sequences, offsets = numbers(batch).repeat_interleave(blocks), numbers(blocks).repeat(batch)
    table = {"tot": batch * blocks, "mlist": sequences, "mlist_len": batch * blocks, "offsetlist": offsets}
    pointers = {"batch_ptr": sequences, "token_chunk_offset_ptr": offsets}
    return SimpleNamespace(nums_dict={size: {**table, **pointers}}, **pointers)


def vllm_state(state: Tensor) -> Tensor:
    """vLLM's copy of [B, D, W]: W - 1 columns, channels side by side."""
    return newest(state).mT.contiguous().mT


FORMS: dict[str, Form] = {
    "torch": _torch,
    "causal_conv1d": _causal_conv1d,
    "fla_gluon": partial(_fla, True),
    "fla_triton": partial(_fla, False),
    "vllm": _vllm,
}

# x [B, D] and the library's state, updated in place -> y [B, D]
Update = Callable[[Tensor, Tensor], Tensor]


def causal_conv1d_update(weight: Tensor, bias: Tensor) -> Update:
    """The CUDA library's, on a state [B, D, W]."""
    function = imported("causal_conv1d", "causal_conv1d_update")
    return lambda x, state: function(x, state, weight, bias, "silu")


def vllm_update(weight: Tensor, bias: Tensor, x: Tensor) -> Update:
    """vLLM's, on what `vllm_state` gives; its result is for `x` of this shape, and overwritten by the next call."""
    function = imported(_VLLM_OPS, "causal_conv1d_update")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = {
        "conv_state_indices": torch.arange(x.shape[0], dtype=torch.int32, device=x.device),
        "null_block_id": _NO_SLOT_IS_PADDING,
        "out": out,
    }
    return lambda x, state: function(x, state, weight, bias, "silu", **options)


def _torch_step(inputs: ConvInputs) -> Step:
    i, state = inputs, _present(inputs)

    def forward() -> Tensors:
        return reference.recurrent_causal_conv1d(i.x, i.weight, i.bias, state, None, "silu"), newest(state)

    return Step(forward)


def _causal_conv1d_step(inputs: ConvInputs) -> Step:
    update, x, state = causal_conv1d_update(inputs.weight, inputs.bias), inputs.x[:, 0], _present(inputs)
    return Step(lambda: (update(x, state)[:, None], newest(state)))


def _fla_step(inputs: ConvInputs) -> Step:
    function = imported("fla.modules.causal_conv1d", "causal_conv1d_update")
    i, state = inputs, _present(inputs)

    def forward() -> Tensors:
        y, _ = function(i.x, state, weight=i.weight, bias=i.bias, activation="silu")
        return y, newest(state)

    return Step(forward)


def _no_gluon_step(inputs: ConvInputs) -> Step:
    raise Missing("has no single-token form in this language")


def _vllm_step(inputs: ConvInputs) -> Step:
    x, state = inputs.x[:, 0], vllm_state(_present(inputs))
    update = vllm_update(inputs.weight, inputs.bias, x)
    return Step(lambda: (update(x, state)[:, None], state))


def _present(inputs: ConvInputs) -> Tensor:
    assert inputs.state is not None
    return inputs.state


STEPS: dict[str, StepForm] = {
    "torch": _torch_step,
    "causal_conv1d": _causal_conv1d_step,
    "fla_gluon": _no_gluon_step,
    "fla_triton": _fla_step,
    "vllm": _vllm_step,
}
