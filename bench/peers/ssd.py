"""Mamba2's scan in other libraries. Where x and b have fewer heads, they get both repeated, outside the clock."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Results
from bench.forms import Form, Inputs, Run, Step, StepForm, Tensors, leaf, named_gradients, narrowed, widened
from bench.peers import Missing, imported

OUTPUTS = ("o", "final_state")


@dataclass(frozen=True, kw_only=True)
class ScanInputs(Inputs):
    """What every contestant of the scan gets: s = softplus(dt + dt_bias), S <- exp(s a) S + s x b^T, o = S c + d x.

    dt_bias and d have values that bf16 holds: FlashInfer wants them and dt in one dtype, and computes the same.
    Gradients come in of o, in its dtype, and of the final state, fp32.
    """

    DIFFERENTIABLE = ("x", "dt", "a", "b", "c", "d", "dt_bias", "initial_state")
    OF_TOKENS = ("x", "dt", "b", "c")
    STATES = ("initial_state",)

    x: Tensor  # [B, T, HX, V]
    dt: Tensor  # [B, T, H]
    a: Tensor  # [H] fp32, < 0
    b: Tensor  # [B, T, GB, K]
    c: Tensor  # [B, T, G, K]
    d: Tensor  # [H] fp32
    dt_bias: Tensor
    initial_state: Tensor | None  # [B, H, V, K]

    @property
    def heads(self) -> int:
        return self.dt.shape[2]

    @cached_property
    def repeated(self) -> tuple[Tensor, Tensor]:
        """x with H heads, b with those of c; made once for all who want them."""
        return widened(self.x, self.heads), widened(self.b, self.c.shape[2])


def _over_repeated(inputs: ScanInputs, function: Callable[..., Tensors]) -> Run:
    """Of a function of all tensors by name, x and b repeated, that gives o and the final state.

    The gradients of x and b are summed over the repeats outside the clock, in fp32.
    """
    x, b = inputs.repeated
    leaves = {name: leaf(t, inputs) for name, t in {**inputs.differentiable(), "x": x, "b": b}.items()}

    def gradients(found: Tensors) -> Results:
        results = named_gradients(tuple(leaves), found)
        heads = {"dx": inputs.x.shape[2], "db": inputs.b.shape[2]}
        return {name: narrowed(t, heads[name]) if name in heads else t for name, t in results.items()}

    return Run(
        forward=lambda: function(**leaves),
        leaves=tuple(leaves.values()),
        output_gradients=inputs.output_gradients,
        outputs=lambda outputs: dict(zip(OUTPUTS, outputs, strict=True)),
        gradients=gradients,
    )


def _mamba_ssm(chunk_size: int, inputs: ScanInputs) -> Run:
    """2.3.2 keeps the states between chunks in the dtype of c, and has no argument for it; the final one is fp32."""
    scan = imported("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")

    def function(
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        dt_bias: Tensor,
        initial_state: Tensor | None = None,
    ) -> Tensors:
        options: dict[str, Any] = {"D": d, "dt_bias": dt_bias, "initial_states": initial_state}
        return scan(x, dt, a, b, c, chunk_size, **options, dt_softplus=True, return_final_states=True)

    return _over_repeated(inputs, function)


def _vllm(chunk_size: int, inputs: ScanInputs) -> Run:
    """Packed sequences, cut into chunks by tables that an engine makes once for all layers: outside the clock."""
    if inputs.wants_gradients:
        raise Missing("has no backward")
    scan = imported("vllm.model_executor.layers.mamba.ops.ssd_combined", "mamba_chunk_scan_combined_varlen")
    batch, tokens = inputs.dt.shape[:2]
    x, b = inputs.repeated
    flat = [t.flatten(0, 1) for t in (x, inputs.dt, b, inputs.c)]
    out = torch.empty_like(flat[0])
    tables = _chunk_tables(batch, tokens, chunk_size, x.device)

    def forward() -> Tensors:
        x, dt, b, c = flat
        final_state = scan(
            *(x, dt, inputs.a, b, c, chunk_size),
            **tables,
            out=out,
            D=inputs.d,
            dt_bias=inputs.dt_bias,
            initial_states=inputs.initial_state,
            dt_softplus=True,
            state_dtype=torch.float32,
        )
        return out.view(batch, tokens, *out.shape[1:]), final_state

    return Run(
        forward=forward,
        leaves=(),
        output_gradients=(),
        outputs=lambda outputs: dict(zip(OUTPUTS, outputs, strict=True)),
        gradients=lambda found: {},
    )


def _chunk_tables(batch: int, tokens: int, chunk_size: int, device: torch.device) -> dict[str, Tensor]:
    """Where sequences and their chunks begin, each sequence's last chunk, and each chunk's sequence; int32."""
    count = -(-tokens // chunk_size)
    numbers = partial(torch.arange, dtype=torch.int32, device=device)
    bounds = numbers(batch + 1) * tokens
    starts = bounds[:-1, None] + numbers(count) * chunk_size
    return {
        "cu_seqlens": bounds,
        "cu_chunk_seqlens": torch.cat([starts.flatten(), bounds[-1:]]),
        "last_chunk_indices": numbers(1, batch + 1) * count - 1,
        "seq_idx": numbers(batch).repeat_interleave(count),
    }


def _for_gla(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, dt_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gated linear attention calls q, k, v and g, [B, T, H, ...] each; all but g, which is fp32, in the dtype."""
    heads = dt.shape[2]
    step = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
    q, k, wide = (_expanded(t, heads) for t in (c, b, x))
    return q.to(dtype), k.to(dtype), (step[..., None] * wide).to(dtype), step * a


def _expanded(tensor: Tensor, heads: int) -> Tensor:
    """`widened`, but differentiable."""
    present = tensor.shape[2]
    return tensor if present == heads else tensor.repeat_interleave(heads // present, dim=2)


def _simple_gla() -> Callable[..., Tensors]:
    """fla's scan of q, k, v, g and an initial state or None, states [B, H, V, K]; its own layout is [K, V].

    fla 0.6.0 refuses its backward on Hopper with Triton 3.4 to 3.7.0, which may miscompile it (its issue 640), and its
    TileLang kernels do not take this function's fp32 states. To have a time it is let through; `prepare` compares its
    gradients with float64 as everybody's, and the rows have their errors.
    """
    chunk_simple_gla = imported("fla.ops.simple_gla", "chunk_simple_gla")
    if refusing := sys.modules.get("fla.ops.common.chunk_o"):
        refusing.TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]

    def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial_state: Tensor | None) -> Tensors:
        o, final_state = chunk_simple_gla(q, k, v, g=g, scale=1.0, initial_state=initial_state, output_final_state=True)
        return o, final_state

    return scan


def _fla(inputs: ScanInputs) -> Run:
    """The core alone: softplus, dt x, the expansion of all heads and the skip lie outside the clock.

    Their gradients too, which are the chain rule in fp32; so are the sums over repeats of x, b and c.
    """
    scan = _simple_gla()
    state = () if inputs.initial_state is None else (inputs.initial_state.mT.contiguous(),)

    i = inputs
    with torch.no_grad():
        core = _for_gla(i.x, i.dt, i.a, i.b, i.c, i.dt_bias, i.x.dtype)
    leaves = tuple(leaf(t, inputs) for t in (*core, *state))
    of_output, of_state = inputs.output_gradients

    def outputs(found: Tensors) -> Results:
        o, final_state = found
        with torch.no_grad():
            return {"o": o + i.d[:, None] * _expanded(i.x, i.heads), "final_state": final_state.mT}

    def gradients(found: Tensors) -> Results:
        of_core, of_initial = found[:4], found[4:]
        given = inputs.differentiable()
        given.pop("initial_state", None)
        x, b, c = (t.to(i.a.dtype) for t in (i.x, i.b, i.c))  # so that the sums are in fp32
        core, skip = _for_gla(x, i.dt, i.a, b, c, i.dt_bias, i.x.dtype), i.d[:, None] * _expanded(x, i.heads)
        results = torch.autograd.grad((*core, skip), tuple(given.values()), (*of_core, of_output.to(skip.dtype)))
        named = named_gradients(tuple(given), results)
        return {**named, "dinitial_state": of_initial[0].mT} if of_initial else named

    return Run(
        forward=lambda: scan(*leaves[:4], leaves[4] if state else None),
        leaves=leaves,
        output_gradients=(of_output, of_state.mT.contiguous()),
        outputs=outputs,
        gradients=gradients,
    )


def _fla_full(inputs: ScanInputs) -> Run:
    """The whole function by means of fla and PyTorch, from where mamba-ssm begins."""
    scan = _simple_gla()

    def function(
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        dt_bias: Tensor,
        initial_state: Tensor | None = None,
    ) -> Tensors:
        core = _for_gla(x, dt, a, b, c, dt_bias, x.dtype)
        o, final_state = scan(*core, None if initial_state is None else initial_state.mT.contiguous())
        return torch.addcmul(o, x, d.to(o.dtype)[:, None]), final_state.mT

    return _over_repeated(inputs, function)


FORMS: dict[str, Form] = {
    "mamba_ssm_c128": partial(_mamba_ssm, 128),
    "mamba_ssm_c256": partial(_mamba_ssm, 256),
    "vllm_c128": partial(_vllm, 128),
    "vllm_c256": partial(_vllm, 256),
    "fla": _fla,
    "fla_full": _fla_full,
}


def step_arguments(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, dt_bias: Tensor
) -> dict[str, Tensor]:
    """The arguments of every library's selective_state_update: one number of a head is expanded, not copied.

    Args:
        x: [B, H, V]. dt: [B, H]. b, c: [B, G, K].
    """
    heads, width = x.shape[1:]
    return {
        "x": x,
        "dt": dt[..., None].expand(-1, -1, width),
        "A": a[:, None, None].expand(heads, width, b.shape[2]),
        "B": b,
        "C": c,
        "D": d[:, None].expand(heads, width),
        "dt_bias": dt_bias[:, None].expand(heads, width),
    }


def _arguments(inputs: ScanInputs, numbers: torch.dtype) -> dict[str, Tensor]:
    x, b = (t[:, 0] for t in inputs.repeated)
    of_heads = inputs.d.to(numbers), inputs.dt_bias.to(numbers)
    return step_arguments(x, inputs.dt[:, 0], inputs.a, b, inputs.c[:, 0], *of_heads)


def _of_one_token(state: Tensor | None, update: Callable[..., Tensor]) -> Step:
    assert state is not None

    return Step(lambda: (update(state)[:, None], state))


def _mamba_ssm_step(inputs: ScanInputs) -> Step:
    function = imported("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    return _of_one_token(inputs.initial_state, partial(function, **_arguments(inputs, torch.float32), dt_softplus=True))


def _vllm_step(inputs: ScanInputs) -> Step:
    function = imported("vllm.model_executor.layers.mamba.ops.mamba_ssm", "selective_state_update")
    arguments = _arguments(inputs, torch.float32)
    out = torch.empty_like(arguments["x"])

    def update(state: Tensor) -> Tensor:
        function(state, **arguments, dt_softplus=True, out=out)
        return out

    return _of_one_token(inputs.initial_state, update)


def _flashinfer_step(inputs: ScanInputs) -> Step:
    function = imported("flashinfer.mamba", "selective_state_update")
    arguments = _arguments(inputs, inputs.dt.dtype)
    return _of_one_token(inputs.initial_state, partial(function, **arguments, dt_softplus=True))


STEPS: dict[str, StepForm] = {"mamba_ssm": _mamba_ssm_step, "vllm": _vllm_step, "flashinfer": _flashinfer_step}
