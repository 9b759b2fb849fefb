"""Makes the quickstart's teacher from nothing but the standard library: tokenizer, random Llama, language modelling.

`python -m hylo.quickstart.train_teacher RECIPE OUT` trains in OUT/run and leaves the teacher in OUT/teacher; called
again with the same arguments after a stop, it goes on from the newest checkpoint. The bundled copy lies in
`hylo/quickstart/teacher/`. The text is the running Python's library, or another one's with `--library DIR`.
"""

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo.distill import Recipe, load_recipe, run_recipe
from hylo.errors import UserError
from hylo.evaluate import LossReport
from hylo.quickstart.corpus import Corpus, load_corpus, write_jsonl, xz_bits_per_byte, xz_bits_per_byte_after
from hylo.quickstart.measure import held_out_text, model_loss, stage_rows, stage_seconds
from hylo.quickstart.paths import path_overrides
from hylo.quickstart.tokenizer import train_tokenizer

INIT_SEED = 0


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """3.5 million parameters: as many as fit, in bf16, in the 8 MB that the package carries."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def train_teacher(recipe_path: Path, out: Path, console: Console, library: Path | None = None) -> Path:
    """Train by `recipe_path` in `out`; returns the directory of the finished teacher, `out`/teacher.

    The text is the standard library in `library`, by default the running Python's.

    Its training.json tells how it came about and how it does on the held-out text beside `xz -9e`.

    Raises:
        UserError: the teacher is there already, `out` holds another recipe's run, or `library` lacks modules.
    """
    finished = out / "teacher"
    if finished.exists():
        raise UserError(f"output directory '{finished}' exists")
    corpus = load_corpus(library)
    random_teacher = _prepare(corpus, out)
    paths = {
        "output": out / "run",
        "student.path": random_teacher,
        "data.sources.0.jsonl": out / "train.jsonl",
        "data.cache_dir": out / "tokens",
    }
    recipe = load_recipe(recipe_path, overrides=path_overrides(paths))
    trained = run_recipe(recipe, resume=(out / "run").exists(), console=console)
    assert trained is not None  # None is a dry run's
    _finish(trained, finished)
    rows = stage_rows(out / "run" / "log.jsonl", recipe.stages[0].name)
    facts = {"recipe": recipe_path.name, "device": _device_name(recipe)} | _facts(corpus, finished, rows)
    (finished / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    console.print_json(data=facts)
    return finished


def _prepare(corpus: Corpus, out: Path) -> Path:
    """Training text, tokenizer and random model on disk; a second call writes the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(corpus.train, out / "train.jsonl")
    tokenizer = train_tokenizer(d.text for d in corpus.train)
    return save_random(teacher_config(tokenizer), tokenizer, out / "random")


def save_random(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """Write a Llama of random values, always the same ones, and its tokenizer; returns `directory`."""
    torch.manual_seed(INIT_SEED)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _finish(trained: Path, finished: Path) -> None:
    """The trained model as it is bundled: weights in bf16, tokenizer beside them."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained)
    LlamaForCausalLM.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(finished)
    tokenizer.save_pretrained(finished)


def _facts(corpus: Corpus, teacher: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    last_tenth = rows[-math.ceil(len(rows) / 10) :]
    held_out = _held_out_loss(corpus, teacher)
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "seconds": round(stage_seconds(rows)),
        "training_text_bytes": corpus.train_bytes,
        "training_loss": sum(row["loss"] for row in last_tenth) / len(last_tenth),
        "held_out_text_bytes": corpus.held_out_bytes,
        "held_out_tokens": held_out.tokens,
        "held_out_loss": held_out.loss,
        "held_out_bits_per_byte": held_out.bits_per_byte,
        "xz_bits_per_byte": xz_bits_per_byte(corpus.held_out),
        "xz_bits_per_byte_after_training_text": xz_bits_per_byte_after(corpus.train, corpus.held_out),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _held_out_loss(corpus: Corpus, teacher: Path) -> LossReport:
    """Of the bf16 weights as bundled, computed in fp32."""
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    return model_loss(model, PreTrainedTokenizerFast.from_pretrained(teacher), held_out_text(corpus))


def _device_name(recipe: Recipe) -> str:
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if on_gpu else "cpu"


def main() -> int:
    """Command line: recipe and directory in, teacher out; 2 where the input is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="YAML recipe with one stage of kind ce")
    parser.add_argument("out", type=Path, help="working directory; holds the finished teacher in the end")
    parser.add_argument("--library", type=Path, help="standard library to read; the running Python's by default")
    arguments = parser.parse_args()
    console = Console()
    try:
        teacher = train_teacher(arguments.recipe, arguments.out, console, arguments.library)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"teacher written to {teacher}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
