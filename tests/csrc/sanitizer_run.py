"""Launches every case of the CUDA kernels once, for compute-sanitizer (tests/gpu.sh): few other kernels, no pytest.

python -m tests.csrc.sanitizer_run [--racecheck] [--part I N] [RUN ...]
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import torch

from hylo_ops import cubin
from hylo_ops.gated_delta_rule import cuda_chunk, cuda_recurrent
from hylo_ops.gated_rms_norm import cuda as gated_rms_norm
from hylo_ops.mla_absorb import cuda as mla_absorb
from hylo_ops.skinny_linear import cuda as skinny_linear
from hylo_ops.ssd import cuda_chunk as ssd_chunk
from tests.csrc import gated_rms_norm_cases, skinny_linear_cases
from tests.ops import (
    convolved_ssd_cases,
    gated_delta_rule_cases,
    gated_delta_rule_fp32_cases,
    mla_absorb_cuda_cases,
    mla_step_cases,
    ssd_cases,
    ssd_plain_cases,
    ssd_step_cases,
)


def run_gated_rms_norm() -> int:
    for case in gated_rms_norm_cases.CASES:
        x, gate, weight = case.inputs("cuda")
        y = gated_rms_norm.forward(x, gate, weight, case.eps, case.norm_before_gate)
        assert torch.isfinite(y.cpu()).all(), case.name
    both = (*gated_rms_norm_cases.CASES, *gated_rms_norm_cases.BACKWARD_CASES)
    for case in both:
        gradients = gated_rms_norm.backward([case.dy("cuda")], *case.inputs("cuda"), case.eps, case.norm_before_gate)
        assert all(torch.isfinite(gradient.cpu()).all() for gradient in gradients), case.name
    return len(gated_rms_norm_cases.CASES) + len(both)


def run_gated_delta_rule() -> int:
    """All chunked kernels and the decode step at every width: few chains and many, packing, a tail, and segments."""
    count = 0
    for K, V in gated_delta_rule_cases.WIDTHS:
        for B, T, bounds in ((1, 333, None), (1, 330, [0, 70, 70, 71, 330]), (70, 70, None), (1, 640, None)):
            sequences = B if bounds is None else len(bounds) - 1
            inputs = gated_delta_rule_cases.make(B, T, 1, 2, K, V, torch.bfloat16, "fast", sequences, device="cuda")
            cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
            options = cu_seqlens, K**-0.5, False
            results = cuda_chunk.forward(*inputs.values(), *options)
            gradients = cuda_chunk.backward(list(results), *inputs.values(), *options)
            for result in (*results, *gradients):
                assert torch.isfinite(result.cpu()).all(), (K, V, T)
            count += 1
        step = gated_delta_rule_cases.make(2, 1, 1, 2, K, V, torch.bfloat16, "fast", 3, device="cuda")
        indices = torch.tensor([2, -1], dtype=torch.int32, device="cuda")
        o = cuda_recurrent.forward(*step.values(), K**-0.5, indices)
        assert torch.isfinite(o.cpu()).all(), (K, V)
        count += 1
    return count


def run_gated_delta_rule_in_fp32() -> int:
    for case in gated_delta_rule_fp32_cases.CASES:
        results, _ = gated_delta_rule_fp32_cases.launch(case, case.inputs("cuda"))
        for result in results:
            assert torch.isfinite(case.sound(result).cpu()).all(), case.name
    return len(gated_delta_rule_fp32_cases.CASES)


def run_ssd() -> int:
    """All chunked kernels, at every width and way of sharing heads: packing, a tail, and segments."""
    count = 0
    for kind, V, K in (
        ("hylo", 64, 64),
        ("mamba2", 64, 128),
        ("hylo", 128, 128),
        ("grouped", 128, 64),
        ("equal", 48, 80),
    ):
        for T, bounds in ((333, None), (330, [0, 70, 70, 71, 330]), (1100, None)):
            sequences = 1 if bounds is None else len(bounds) - 1
            inputs = ssd_cases.make(1, T, kind, V, K, torch.bfloat16, "fast", sequences, device="cuda")
            cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device="cuda")
            names = "x", "dt", "a", "b", "c", "d", "dt_bias", "initial_state"
            tensors = [inputs[name] for name in names]
            options = cu_seqlens, True, None, False
            *results, states = ssd_chunk.forward(*tensors, *options, save_states=True)
            gradients = ssd_chunk.backward(results, *tensors, *options, states=states)
            gradients += ssd_chunk.backward(results, *tensors, *options)
            for result in (*results, *gradients):
                assert torch.isfinite(result.cpu()).all(), (kind, V, K, T)
            count += 1
    return count


def run_convolved_ssd() -> int:
    for case in convolved_ssd_cases.CASES:
        inputs = [case.inputs("cuda")[name] for name in convolved_ssd_cases.NAMES]
        options = *case.dims, True, None, True, "cuda"
        *results, mixed, _ = torch.ops.hylo_ops.convolved_ssd(*inputs, None, *options)
        assert all(torch.isfinite(result.cpu()).all() for result in (*results, mixed)), case.name
    return len(convolved_ssd_cases.CASES)


def run_ssd_on_cuda_cores() -> int:
    for case in ssd_plain_cases.CASES:
        results, _ = ssd_plain_cases.launch(case, case.inputs("cuda"))
        for name, result in results.items():
            assert torch.isfinite(case.sound(name, result).cpu()).all(), (case.name, name)
    return len(ssd_plain_cases.CASES)


def run_ssd_steps() -> int:
    """Both decode steps, of few states and of many: clusters of one block, of some and of the most."""
    mamba2 = ssd_step_cases.Mamba2Case(128, 64, H=32, shared=(32, 1, 1))
    hylo = ssd_step_cases.Mamba2Case(64, 64, H=32, shared=(8, 8, 32), norms=32)
    many = [dataclasses.replace(case, B=20) for case in (mamba2, hylo)]
    cases = [*ssd_step_cases.CASES, *ssd_step_cases.MANY, *ssd_step_cases.MAMBA2_CASES, mamba2, hylo, *many]
    for case in cases:
        o = case.function()(**case.inputs("cuda"), backend="cuda")
        assert torch.isfinite(o.cpu()).all(), case.name
    return len(cases)


# Every latent and rope width. At few query rows: more of them are other kernels of the same parts, and among the cases.
WIDTHS = [(R, E) for R in range(16, 577, 16) for E in (0, 32, 64)]
FEW = 8
ALL = slice(None)


def run_mla_absorb(part: slice = ALL, racecheck: bool = False) -> int:
    """Sequences in few and many pieces, of blocks and of clusters, and whole; every width, every number of rows."""
    case = mla_absorb_cuda_cases.Case
    cases = [*mla_absorb_cuda_cases.EMULATED, *mla_absorb_cuda_cases.GATHERED]
    cases += [case(512, 64, 16, (330, 65, 400), spread=(1, 1))]
    cases += [case(128, 32, H, (500, 3, 0, 2200), spread=(4, 2)) for H in (8, 16, 24, 32, 48, 64, 128)]
    of_widths = [case(R, E, FEW, (300, 3, 0, 70), spread=(2, 1)) for R, E in WIDTHS]
    cases = [one for one in (*cases, *of_widths) if not (racecheck and refills_in_a_cluster(one))][part]
    kinds = [mla_absorb.spec("bf16", one.R, one.E, FEW, False) for one in cases if one in of_widths]
    cubin.compile_missing(kinds, None)  # all at once, as few of them are packaged
    for one in cases:
        x = one.inputs("cuda")
        inputs = [x[name] for name in mla_absorb_cuda_cases.NAMES]
        o, _ = mla_absorb.forward(*inputs, mla_absorb_cuda_cases.SCALE, one.causal, one.fixed_split, spread=one.spread)
        assert torch.isfinite(o.cpu()).all(), one.name
    return len(cases)


def refills_in_a_cluster(case: mla_absorb_cuda_cases.Case) -> bool:
    """Whether a cluster's blocks have more tiles than stages: racecheck does not come to the end of that."""
    return case.fp8 and case.fixed_split


def run_mla_step() -> int:
    """Few sequences and many, with padding; what the published models ask for."""
    case = mla_step_cases.Case
    cases = [*mla_step_cases.EMULATED, case(32, 8, 32, 128, 32, 64, padding=(1,)), case(24, 8, 64, 128, 64, 128)]
    cases += [case(16, 8, 64, 256, 64, 128, scales=8), case(32, 8, 32, 128, 32, 64, (9, 70, 3) * 20)]
    for one in cases:
        o = mla_step_cases.by_op(one.inputs("cuda"))
        assert torch.isfinite(o.cpu()).all(), one.name
    return len(cases)


def run_skinny_linear() -> int:
    for case in skinny_linear_cases.EMULATED:
        for constant in (False, True):
            y = skinny_linear.forward(**case.inputs("cuda"), constant=constant, spread=case.spread)
            assert torch.isfinite(y.cpu()).all(), case.name
    return 2 * len(skinny_linear_cases.EMULATED)


RUNS: tuple[Callable[[], int], ...] = (
    run_gated_rms_norm,
    run_gated_delta_rule,
    run_gated_delta_rule_in_fp32,
    run_ssd,
    run_convolved_ssd,
    run_ssd_on_cuda_cores,
    run_ssd_steps,
    run_mla_absorb,
    run_mla_step,
    run_skinny_linear,
)


def for_racecheck(spec: cubin.Spec) -> cubin.Spec:
    """Of a kernel of mla_absorb: csrc/mla_absorb/block.cuh says what differs."""
    return dataclasses.replace(spec, defines=(*spec.defines, ("MEET_TWICE", 1)))


def meet_twice() -> None:
    """From here on mla_absorb's kernels are those for racecheck."""
    plain = mla_absorb.spec
    mla_absorb.spec = lambda *dims: for_racecheck(plain(*dims))


def main() -> None:
    names = {run.__name__.removeprefix("run_"): run for run in RUNS}
    parser = argparse.ArgumentParser(description="Launches every case of the CUDA kernels once.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(names)}; all if none is named")
    parser.add_argument("--racecheck", action="store_true", help="what that can follow, with kernels made for it")
    parser.add_argument(
        "--part", type=int, nargs=2, metavar=("I", "N"), help="mla_absorb's cases I, I + N, I + 2 N, ..."
    )
    chosen = parser.parse_args()
    first, step = chosen.part or (0, 1)
    names["mla_absorb"] = functools.partial(run_mla_absorb, slice(first, None, step), chosen.racecheck)
    if chosen.part is not None:
        names = {"mla_absorb": names["mla_absorb"]}
    if unknown := set(chosen.runs) - set(names):
        parser.error(f"no run is named {sorted(unknown)}; there are {', '.join(names)}")
    if chosen.racecheck:
        meet_twice()
    for name in chosen.runs or names:
        print(f"{name}: {names[name]()} cases launched", flush=True)


if __name__ == "__main__":
    main()
