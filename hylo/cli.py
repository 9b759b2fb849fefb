"""Command line: hylo upcycle | distill | memory | evaluate | generate | quickstart. A wrong input exits with 2."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hylo.errors import ToldElsewhere, UserError

app = typer.Typer(
    help="Hybrid language models out of pretrained Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Mixer(StrEnum):
    gated_deltanet = "gated_deltanet"
    mamba2 = "mamba2"


class Initialisation(StrEnum):
    published = "published"
    aligned = "aligned"


def layer_list(text: str) -> list[int]:
    """ "1,5,10,14" -> [1, 5, 10, 14]"""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--mla-layers must be numbers between commas, got {text!r}") from None


@app.command()
def upcycle(
    base: Annotated[str, typer.Option(help="Directory or hub id of a Llama or Qwen3 checkpoint.")],
    out: Annotated[Path, typer.Option(help="New directory for the hybrid.")],
    mixer: Annotated[Mixer, typer.Option(help="What every other layer becomes.")] = Mixer.gated_deltanet,
    mla_layers: Annotated[str, typer.Option(help="Layers that become MLA, between commas, counted from 0.")] = "",
    init: Annotated[
        Initialisation, typer.Option(help="The paper's initialisation, or ours.")
    ] = Initialisation.published,
    kv_lora_rank: Annotated[int | None, typer.Option(help="Latent rank of keys and values, in elements.")] = None,
    q_lora_rank: Annotated[int | None, typer.Option(help="Latent rank of queries, in elements.")] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="Rotated width of an MLA head, in elements.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of whatever starts at random.")] = 42,
) -> None:
    """Replace a Transformer's attention by MLA and linear blocks, starting from its weights."""
    from hylo.upcycle import upcycle as run

    run(
        base,
        mixer=mixer.value,
        mla_layers=layer_list(mla_layers),
        out=str(out),
        init=init.value,
        kv_lora_rank=kv_lora_rank,
        q_lora_rank=q_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        seed=seed,
    )
    typer.echo(f"hybrid: {out}")


@app.command()
def distill(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe (docs/distillation.md).")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY.SUBKEY=VALUE, over the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with this recipe's unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Build without weights, print the tables, write nothing.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps of every stage, instead of the recipe's.")] = None,
) -> None:
    """Align and distil a student, stage by stage, as a recipe says."""
    from hylo.distill import run_recipe

    result = run_recipe(recipe, resume=resume, dry_run=dry_run, steps=steps, overrides=set_ or ())
    if result is not None:
        typer.echo(f"model: {result}")


@app.command()
def memory(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe (docs/distillation.md).")],
    stage: Annotated[int | None, typer.Option(help="One stage alone, counted from 0.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share parameters and optimiser.")] = 1,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sequence, instead of the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences in one forward pass, likewise.")] = None,
    gpu_gib: Annotated[float, typer.Option(min=1, help="Memory of a GPU, in GiB.")] = 80,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY.SUBKEY=VALUE, over the recipe's.")] = None,
) -> None:
    """What a recipe takes of a GPU's memory, by formula (docs/memory.md)."""
    from rich.console import Console

    from hylo.memory import memory_command

    memory_command(
        recipe,
        stage=stage,
        gpus=gpus,
        length=length,
        batch=batch,
        gpu_gib=gpu_gib,
        overrides=set_ or (),
        console=Console(),
    )


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of the model.")],
    text: Annotated[Path, typer.Option(help="Held-out text, UTF-8.")],
    out: Annotated[Path, typer.Option(help="New directory for report.json and plots.")],
    teacher: Annotated[Path | None, typer.Option(help="Directory of the model to compare with.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows evaluated together.")] = 1,
    needle: Annotated[bool, typer.Option(help="Look for needles in the text as well.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Held-out loss, loss by position, needle retrieval and cache size, as table, JSON and plots."""
    from rich.console import Console

    from hylo.evaluate import evaluate_command

    evaluate_command(
        model,
        teacher,
        text,
        out,
        window=window,
        batch_size=batch_size,
        needle="prose" if needle else None,
        device=device,
        console=Console(),
    )
    typer.echo(f"report: {out / 'report.json'}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="Directory of the model.")],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from; '-' reads standard input.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 file to go on from; its text is not repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that reach this probability.")] = None,
    prefill_chunk_size: Annotated[int | None, typer.Option(help="Tokens of the prompt read at a time.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Continue a text; the new text comes on standard output, token by token, progress on standard error."""
    from hylo.generate import stream_text
    from hylo.inference import Sampling
    from hylo.text import read_utf8

    if (prompt is None) == (prompt_file is None):
        raise UserError("give either --prompt or --prompt-file")
    if prompt_file is not None:
        text = read_utf8(prompt_file)
    elif prompt == "-":
        text = sys.stdin.read()
    else:
        text = str(prompt)
    pieces = stream_text(
        model,
        text,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        prefill_chunk_size=prefill_chunk_size,
        device=device,
        seed=seed,
    )
    if prompt_file is None:
        typer.echo(text, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="New directory for the results.")] = Path("runs/quickstart"),
    short: Annotated[bool, typer.Option(help="A tenth of the training steps.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in the directory.")] = False,
) -> None:
    """The whole road in minutes on a CPU: the bundled teacher becomes a hybrid; report and plots."""
    from hylo.quickstart.run import run_quickstart

    run_quickstart(out, short=short, resume=resume)


def main() -> None:
    try:
        app()
    except UserError as error:
        if not isinstance(error, ToldElsewhere):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
