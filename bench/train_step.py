"""python -m bench.train_step: training steps at a published model's true dims, on our kernels and on other libraries'.

One model with random weights and the engine's own step; a contestant is the same model made of a library's layers, on
the same parameters, and all take turns. Tokens a second, peak memory and the share of the GPU's bf16 peak; a contestant
that runs out of memory is an entry that says so.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record, timing
from bench.flops import PEAK_BF16, step_flop
from bench.peers import Missing, layers, mixers
from bench.steps import Case, Steps, most_bytes, random_steps
from hylo.distill.layers import decoder_layers, final_hidden
from hylo.distill.recipe import Recipe
from hylo.memory import Job, peak, stage_job

HERE = Path(__file__).parent
OURS = "hylo"
CHECKED = 512  # tokens on which contestants are compared before the clock starts
BUDGET = 2  # a peer's error in bf16 over ours; beyond that it is another function
LIMIT = 0.3  # of ours: sixteen layers of random weights round to a tenth in bf16
FILLED = 0.92  # of a GPU's memory: what is left is the context's, the workspaces' and the allocator's
GDN, M2 = "llama-3.2-1b-4mla12gdn", "llama-3.2-1b-4mla12m2"


@dataclass(frozen=True)
class TrainCase(Case):
    """One micro-batch a step. Where it `fills`, with as many sequences as a GPU has memory for, by formula."""

    fills: bool = False

    def filled(self, memory: int) -> "TrainCase":
        """With the largest batch whose step takes no more bytes than this, and one sequence at least."""
        if not self.fills:
            return self
        recipe, batch = self.load(), 1
        while peak(stage_job(recipe, self.stage, batch=batch + 1)).total <= memory:
            batch += 1
        return replace(self, changes=self.changes | {"batch_size": batch}, fills=False)


def _case(recipe: str, *, fills: bool = False, **changes: Any) -> TrainCase:
    """Of a recipe's last stage."""
    return TrainCase(recipe, 1, {"gradient_accumulation": 1} | changes, fills)


CASES = {
    "gdn-ce-8k": _case(f"{GDN}-8k", kind="ce"),
    "gdn-ce-64k": _case(f"{GDN}-64k", kind="ce"),
    "gdn-ce-64k-selective": _case(f"{GDN}-64k", kind="ce", activation_checkpointing="selective"),
    "m2-ce-8k": _case(f"{M2}-8k", kind="ce"),
    "m2-ce-64k": _case(f"{M2}-64k", kind="ce"),
    # With the teacher of 8B.
    "gdn-kl-8k": _case(f"{GDN}-8k"),
    "gdn-kl-8k-full": _case(f"{GDN}-8k", fills=True),
    "gdn-kl-64k": _case(f"{GDN}-64k"),
    "m2-kl-64k": _case(f"{M2}-64k"),
}


# ---------------------------------------------------------------- contestants


@dataclass(frozen=True)
class Side:
    """What the layers of a model are made of, by the names that they have for it, and the norm behind them."""

    layers: list[dict[str, nn.Module]]
    norm: nn.Module

    def install(self, model: Any) -> None:
        for layer, pieces in zip(decoder_layers(model), self.layers, strict=True):
            for name, piece in pieces.items():
                setattr(layer, name, piece)
        model.model.norm = self.norm


def own_side(model: Any) -> Side:
    names = ("input_layernorm", "mixer", "post_attention_layernorm", "mlp")
    return Side([{name: getattr(layer, name) for name in names} for layer in decoder_layers(model)], model.model.norm)


def peer_side(model: Any, ours: Side, peer: str) -> Side:
    """The same parameters in a library's layers; those of MLA with PyTorch's attention.

    Raises:
        Missing: the library is not installed.
    """
    kind, make_mixer = mixers.MIXERS[peer]
    make_norm, make_mlp = layers.PIECES[peer]
    make = {"input_layernorm": make_norm, "post_attention_layernorm": make_norm, "mlp": make_mlp}
    made = []
    for one, pieces in zip(model.config.mixer_types, ours.layers, strict=True):
        of_mixer = make_mixer if one == kind else mixers.SdpaMla
        made.append({name: (make | {"mixer": of_mixer})[name](piece) for name, piece in pieces.items()})
    return Side(made, make_norm(ours.norm))


# ---------------------------------------------------------------- right results first


def probe(steps: Steps, side: Side, *, half: bool) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states of a short sequence, and the gradients of a random projection of them.

    Args:
        half: in the stage's autocast, else in the weights' fp32.
    """
    student: Any = steps.job.student
    device = steps.job.device
    side.install(student)
    length = min(CHECKED, steps.job.stage.sequence_length)
    generator = torch.Generator(device).manual_seed(1)
    ids = torch.randint(student.config.vocab_size, (1, length), device=device, generator=generator)
    with steps.job.autocast() if half else nullcontext():
        hidden = final_hidden(student, ids)
    towards = torch.randn(hidden.shape, device=device, generator=generator)
    (hidden.float() * towards).mean().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in steps.parameters]
    steps.optimizer.zero_grad(set_to_none=True)
    return hidden.detach().float(), gradients


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Norm of all differences over that of all exact values."""
    pairs = list(zip(found, exact, strict=True))
    wrong = sum(float((one - other).float().square().sum()) for one, other in pairs)
    return math.sqrt(wrong / sum(float(other.float().square().sum()) for _, other in pairs))


def errors(steps: Steps, side: Side, exact: tuple[Tensor, list[Tensor]]) -> dict[str, float]:
    hidden, gradients = probe(steps, side, half=True)
    return {"hidden": relative([hidden], [exact[0]]), "gradients": relative(gradients, exact[1])}


def right_sides(steps: Steps, peers: Sequence[str]) -> tuple[dict[str, Side], dict[str, dict[str, Any]]]:
    """Contestants that are there and are no further from ours in fp32 than twice ours in bf16; an entry for each.

    Raises:
        AssertionError: ours in bf16 is further from ours in fp32 than the limit.
    """
    student = steps.job.student
    ours = own_side(student)
    exact = probe(steps, ours, half=False)
    own = errors(steps, ours, exact)
    assert all(error <= LIMIT for error in own.values()), f"ours is off by {own}"
    sides: dict[str, Side] = {OURS: ours}
    entries: dict[str, dict[str, Any]] = {OURS: {"errors": own}}
    for name in peers:
        try:
            side = peer_side(student, ours, name)
            found = errors(steps, side, exact)
        except Missing as reason:
            entries[name] = {"missing": str(reason)}
        except Exception as problem:  # each library has its own; one that breaks must not end the others' run
            entries[name] = {"missing": failure(problem)}
        else:
            right = all(found[what] <= BUDGET * own[what] for what in own)  # NaN is not
            entries[name] = {"errors": found} if right else {"missing": f"disagrees with fp32: {found}"}
            if right:
                sides[name] = side
        steps.optimizer.zero_grad(set_to_none=True)
    return sides, entries


def failure(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(problem).__name__}: {' '.join(str(problem).splitlines()[:1])}"


# ---------------------------------------------------------------- the clock


def timed_step(steps: Steps, side: Side, step: int) -> float:
    """Seconds of one optimiser step. Fails on a loss or gradient that is not finite."""
    side.install(steps.job.student)
    device = torch.get_device_module(steps.job.device)
    device.synchronize()
    begin = time.perf_counter()
    loss, norm = steps.run(step)
    device.synchronize()
    seconds = time.perf_counter() - begin
    assert math.isfinite(float(loss)), f"loss {float(loss)} with gradient norm {float(norm)}"
    assert math.isfinite(float(norm)), f"gradient norm {float(norm)}"
    return seconds


def take_turns(steps: Steps, sides: dict[str, Side], rounds: int, take: Callable[[], int]) -> dict[str, dict[str, Any]]:
    """Seconds of each round and the most bytes, by contestant; the first round compiles and does not count.

    Args:
        take: the most bytes at one time since it was last called.
    """
    found: dict[str, dict[str, Any]] = {name: {"rounds": [], "peak_bytes": 0} for name in sides}
    for step in range(rounds + 1):
        for name in [name for name, entry in found.items() if "missing" not in entry]:
            take()
            try:
                seconds = timed_step(steps, sides[name], step)
            except Exception as problem:
                if name == OURS and not isinstance(problem, torch.OutOfMemoryError):
                    raise
                found[name] = {"missing": failure(problem)}
            if "missing" in found[name]:  # out here what the exception held is gone
                release(steps)
            elif step:
                found[name]["rounds"].append(seconds)
                found[name]["peak_bytes"] = max(found[name]["peak_bytes"], take())
    return found


def release(steps: Steps) -> None:
    steps.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if steps.job.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- rows


def measure(
    recipe: Recipe, stage: int, peers: Sequence[str], rounds: int, device: torch.device, take: Callable[[], int]
) -> dict[str, dict[str, Any]]:
    """An entry for ours and for each peer: its errors, seconds a step and peak bytes, or why it is missing."""
    try:
        steps = random_steps(recipe, stage, device, rounds + 1)
        sides, entries = right_sides(steps, peers)
    except torch.OutOfMemoryError:
        return {OURS: {"missing": "out of memory"}} | {name: {"missing": "not tried"} for name in peers}
    for name, found in take_turns(steps, sides, rounds, take).items():
        entries[name] |= found
    return entries


def row(
    name: str, case: TrainCase, peers: Sequence[str], rounds: int, device: torch.device, take: Callable[[], int]
) -> dict[str, Any]:
    """One case in the form of the result files."""
    recipe = case.load()
    job = stage_job(recipe, case.stage)
    fitting = [peer for peer in peers if mixers.MIXERS[peer][0] in (job.student.mixer_types or ())]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    entries = {
        one: entry | rates(job, entry, gpu)
        for one, entry in measure(recipe, case.stage, fitting, rounds, device, take).items()
    }
    ours = entries.pop(OURS)
    flop = step_flop(job)
    return {
        "case": name, "recipe": case.recipe, "pass": "train_step", "kind": job.kind, "changes": case.changes,
        "shape": {"B": job.batch, "T": job.length}, "dtype": "bf16", "teacher": job.teacher is not None,
        "checkpointing": job.checkpointing, "parameters": job.trainable.total,
        "flop": flop.model, "flop_again": flop.again, "formula_peak_bytes": peak(job).total,
        "backend": OURS, **ours, "peers": entries, **best(ours, entries),
    }  # fmt: skip


def rates(job: Job, entry: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """Of a contestant that was timed: median seconds, tokens a second, shares of the GPU's bf16 peak by counted FLOP.

    Without (MFU) and with (HFU) what is run a second time; None where the peak is not known.
    """
    if not entry.get("rounds"):
        return {}
    seconds, flop, most = statistics.median(entry["rounds"]), step_flop(job), PEAK_BF16.get(gpu or "")
    return {
        "seconds": seconds,
        "tokens_per_second": job.tokens / seconds,
        "mfu": most and flop.model / seconds / most,
        "hfu": most and (flop.model + flop.again) / seconds / most,
    }


def best(ours: dict[str, Any], peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The fastest peer, and its seconds over ours."""
    timed = {name: entry["seconds"] for name, entry in peers.items() if "seconds" in entry}
    if not timed or "seconds" not in ours:
        return {"best_peer": None, "ratio": None}
    fastest = min(timed, key=timed.__getitem__)
    return {"best_peer": fastest, "ratio": timed[fastest] / ours["seconds"]}


def lines(found: dict[str, Any]) -> list[str]:
    """A row in words, a line for each contestant."""
    shape = f"{found['case']}, {found['shape']['B']} x {found['shape']['T']} tokens"
    return [f"{shape}: {words(name, entry)}" for name, entry in ({OURS: found} | found["peers"]).items()]


def words(name: str, entry: dict[str, Any]) -> str:
    if "missing" in entry:
        return f"{name} missing, {entry['missing']}"
    share = "" if entry["mfu"] is None else f", {100 * entry['mfu']:.1f} % of the peak"
    gib = entry["peak_bytes"] / 2**30
    return f"{name} {entry['seconds']:.3f} s, {entry['tokens_per_second']:.0f} tokens/s, {gib:.2f} GiB{share}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=list(mixers.MIXERS), metavar="NAME", default=list(mixers.MIXERS))
    parser.add_argument("--batch", type=int, help="sequences of a step, instead of the case's")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument("--out", type=Path, help="JSON file; bench/results/<gpu>/train_step.json by default")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    return parser.parse_args(arguments)


def chosen(name: str, batch: int | None, memory: int) -> TrainCase:
    case = CASES[name]
    if batch is not None:
        return replace(case, changes=case.changes | {"batch_size": batch}, fills=False)
    return case.filled(memory)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("error: the training step needs an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    memory = int(FILLED * torch.cuda.get_device_properties(device).total_memory)
    result: dict[str, Any] = {"meta": record.meta(options.commit), "rows": []}
    result["meta"]["product_flop_per_second"] = timing.product_flop_rate()
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu / "train_step.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.case:
        case = chosen(name, options.batch, memory)
        result["rows"].append(row(name, case, options.peers, options.rounds, device, most_bytes))
        out.write_text(json.dumps(result, indent=1) + "\n")
        print("\n".join(lines(result["rows"][-1])), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
