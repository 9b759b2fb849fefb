"""The whole road on a real checkpoint: stories260K becomes 1 MLA + 4 linear layers, aligned and distilled on a CPU.

    python -m tests.run_stories260k [--out runs/stories260k] [--mixer NAME ...] [--init NAME ...] [--device cuda]

One run for each mixer and initialisation; `results.json` has the losses after initialisation, alignment and
distillation, the seconds they took and the greedy text. Held out are the last 200 stories, one story a sequence cut at
512 tokens, as the checkpoint's own figure is measured.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hylo.distill import parse_recipe, run_recipe
from hylo.evaluate import cache_bytes
from hylo.provenance import source_commit
from hylo.upcycle import upcycle
from tests import stories260k

HELD_OUT = 200  # stories
PROMPT = "Once upon a time"
# One MLA layer that caches 26 + 6 of the teacher's 5 x 2 x 4 x 8 = 320 elements a token.
LAYOUT: dict[str, Any] = {"mla_layers": [1], "kv_lora_rank": 26, "qk_rope_head_dim": 6}
STEPS = {"ild": {"gated_deltanet": 100, "mamba2": 100}, "kd": {"gated_deltanet": 1200, "mamba2": 1500}}
SHARED: dict[str, Any] = {
    "sequence_length": 256,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "betas": [0.9, 0.95],
    "warmup_ratio": 0.03,
    "checkpoint_every": 400,
    "log_every": 20,
}


def prepare(out: Path) -> tuple[Path, list[str]]:
    """Base directory, training text and a tokenizer for it; returns the base and the held-out stories."""
    base = stories260k.write_base(out / "base")
    # The checkpoint was trained on stories that begin with BOS and end with nothing.
    tokenizer = stories260k.load_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(out / "tokenizer")
    stories = stories260k.stories()
    lines = [json.dumps({"text": story}) for story in stories[:-HELD_OUT]]
    (out / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return base, stories[-HELD_OUT:]


@torch.no_grad()
def loss(directory: Path, stories: list[str]) -> float:
    """Nats per token over all stories, each a sequence of its own."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer, total, count = stories260k.load_tokenizer(), 0.0, 0
    for story in stories:
        ids = torch.tensor([tokenizer(story)["input_ids"][:512]])
        total += float(model(ids, labels=ids, use_cache=False).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def greedy(directory: Path, new_tokens: int = 120) -> str:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = stories260k.load_tokenizer()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(found[0], skip_special_tokens=True))


def recipe(base: Path, student: Path, mixer: str, device: str, out: Path) -> Any:
    stages = [{"name": kind, "kind": "kl" if kind == "kd" else kind, "steps": STEPS[kind][mixer]} for kind in STEPS]
    return parse_recipe(
        {
            "name": out.name,
            "output": str(out / "distillation"),
            "seed": 1,
            "precision": "fp32",
            "device": device,
            "student": {"path": str(student)},
            "teacher": str(base),
            "data": {
                "sources": [{"jsonl": str(out.parent / "train.jsonl")}],
                "tokenizer": str(out.parent / "tokenizer"),
                "cache_dir": str(out.parent / "tokens"),
            },
            "stages": [{**stage, **SHARED} for stage in stages],
        }
    )


def run(
    base: Path, held_out: list[str], mixer: str, init: str, device: str, commit: str | None, out: Path
) -> dict[str, Any]:
    begin = time.perf_counter()
    result = upcycle(str(base), mixer=mixer, init=init, out=str(out / "student"), **LAYOUT)
    distillation = run_recipe(recipe(base, out / "student", mixer, device, out))
    assert distillation is not None
    seconds = time.perf_counter() - begin
    teacher, hybrid = (cache_bytes(config, torch.float32) for config in (load_config(base), result.config))
    return {
        "mixer": mixer,
        "init": init,
        "device": device,
        "commit": commit,
        "steps": {stage: steps[mixer] for stage, steps in STEPS.items()},
        "cache_share": hybrid.per_token / teacher.per_token,
        "loss_after_init": loss(out / "student", held_out),
        "loss_after_ild": loss(out / "distillation" / "ild" / "model", held_out),
        "loss_after_kd": loss(distillation, held_out),
        "seconds": seconds,
        "text": greedy(distillation),
    }


def load_config(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).config


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run_stories260k", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stories260k"), help="new directory")
    parser.add_argument("--mixer", nargs="+", default=["gated_deltanet", "mamba2"])
    parser.add_argument("--init", nargs="+", default=["published", "aligned"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to align and distil")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    options = parser.parse_args()
    if not stories260k.CHECKPOINT.is_file():
        print(f"error: the checkpoint is not there: {stories260k.CHECKPOINT.name}", file=sys.stderr)
        return 2
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    base, held_out = prepare(options.out)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "training": SHARED,
        "layout": LAYOUT,
        "teacher_loss": loss(base, held_out),
        "teacher_text": greedy(base),
        "runs": [],
    }
    for mixer in options.mixer:
        for init in options.init:
            out = options.out / f"{mixer}-{init}"
            commit = options.commit or source_commit()
            results["runs"].append(run(base, held_out, mixer, init, options.device, commit, out))
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(results["runs"][-1], indent=1), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
