"""python -m bench.processes: the same steps of distillation in one process and in several: losses, tokens/s, memory.

Random weights in student and teacher; the text is this Python's standard library. On GPUs, one for each process.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import hylo
from bench import record
from hylo.distill import run_recipe
from hylo.quickstart.run import TEACHER as TOKENIZER

ROOT = Path(__file__).parents[1]
WARM_UP = 5  # steps that are not timed
# of student and teacher
SHARED_DIMS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)


@dataclass(frozen=True)
class Size:
    """A published layout cut to its first layers, the teacher a Llama of the same dims, and a step's sequences."""

    layers: int
    length: int
    batch_size: int
    gradient_accumulation: int
    layout: str = "Llama-4MLA12GDN"
    changes: dict[str, Any] = field(default_factory=dict)


SIZES = {
    "small": Size(layers=4, length=2048, batch_size=2, gradient_accumulation=8, changes={"vocab_size": 32768}),
    "1b": Size(layers=16, length=8192, batch_size=4, gradient_accumulation=2),
}


def prepare(directory: Path, size: Size, steps: int, device: str) -> Path:
    """Save student and teacher with random weights; returns the recipe's path."""
    config = hylo_config(size)
    torch.manual_seed(0)
    with torch.device(device):
        hylo.HyloForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "student")
        dims = {name: getattr(config, name) for name in SHARED_DIMS}
        LlamaForCausalLM(LlamaConfig(**dims)).to(torch.bfloat16).save_pretrained(directory / "teacher")
    if device == "cuda":
        torch.cuda.empty_cache()  # the GPU is the other processes' now
    recipe = directory / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(directory, size, steps, device)))
    return recipe


def hylo_config(size: Size) -> hylo.HyloConfig:
    published = hylo.published_variants()[size.layout].to_dict()
    mixers = published["mixer_types"][: size.layers]
    cut = {"num_hidden_layers": size.layers, "mixer_types": mixers, "layer_types": None}
    return hylo.HyloConfig.from_dict(published | cut | {"bos_token_id": None, "eos_token_id": None} | size.changes)


def recipe_values(directory: Path, size: Size, steps: int, device: str) -> dict[str, Any]:
    stage = {
        "name": "distil",
        "kind": "kl",
        "steps": steps,
        "sequence_length": size.length,
        "batch_size": size.batch_size,
        "gradient_accumulation": size.gradient_accumulation,
        "learning_rate": 1e-4,
        "activation_checkpointing": True,
        "log_every": 1,
        "checkpoint_every": steps + 1,
    }
    return {
        "name": "processes",
        "output": str(directory / "run"),
        "precision": "bf16" if device == "cuda" else "fp32",
        "device": device,
        "student": {"path": str(directory / "student")},
        "teacher": str(directory / "teacher"),
        "data": {
            "sources": [{"text": f"{sysconfig.get_path('stdlib')}/*.py"}],
            "tokenizer": str(TOKENIZER),
            "cache_dir": str(directory / "tokens"),
        },
        "stages": [stage],
    }


def run_in(processes: int, recipe: Path) -> dict[str, Any]:
    """Train in new processes; losses, tokens per second after the warm-up, GiB at the peak of each GPU."""
    output = recipe.parent / f"run-{processes}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "bench.processes"]
    subprocess.run([*command, "--train", str(recipe), str(output)], cwd=ROOT, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    first, last = rows[min(WARM_UP, len(rows)) - 1], rows[-1]
    return {
        "processes": processes,
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
        "peak_gib": [json.loads(path.read_text()) for path in sorted(output.glob("peak-*.json"))],
        "losses": [row["loss"] for row in rows],
    }


def train(recipe: Path, output: Path) -> None:
    """One of the processes: run the recipe and write down this one's peak."""
    run_recipe(recipe, overrides=[f"output={output}"])
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    (output / f"peak-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(peak))


def compare(size: Size, *, counts: Sequence[int], steps: int, device: str) -> dict[str, Any]:
    """Runs in each number of processes, and how far the others' losses and speed are from the first's."""
    with tempfile.TemporaryDirectory() as directory:
        recipe = prepare(Path(directory), size, steps, device)
        runs = [run_in(count, recipe) for count in counts]
    alone = runs[0]
    for run in runs[1:]:
        pairs = zip(run["losses"], alone["losses"], strict=True)
        run["loss_difference"] = max(abs(loss - other) for loss, other in pairs)
        run["speed_ratio"] = run["tokens_per_second"] / alone["tokens_per_second"]
    return {
        "steps": steps,
        "tokens_per_step": size.length * size.batch_size * size.gradient_accumulation,
        "runs": runs,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.processes", description=__doc__)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--processes", type=int, default=2, help="beside one")
    parser.add_argument("--steps", type=int, default=20, help=f"more than {WARM_UP}, which are not timed")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="what to write into the result where there is no git")
    parser.add_argument("--train", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(*options.train)
        return 0
    if torch.cuda.device_count() < options.processes:
        found = torch.cuda.device_count()
        print(f"error: {options.processes} processes need a GPU each, and torch finds {found}", file=sys.stderr)
        return 2
    measured = compare(SIZES[options.size], counts=(1, options.processes), steps=options.steps, device="cuda")
    result = json.dumps({"meta": record.meta(options.commit), "size": options.size} | measured, indent=1)
    print(result)
    if options.out is not None:
        options.out.write_text(result + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
