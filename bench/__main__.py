"""python -m bench STEM [--case NAMES] [--backend NAMES] [--peers NAMES] [--out DIR]: prints a table, writes STEM.json.

Several names are separated by commas or spaces. The file is written anew after every row, so that a run that is
stopped keeps what it has. With --append, a run adds its cases to those of another run of the same commit on the same
GPU, and measures against that run's roofs.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import record, timing
from bench.contest import Roofs

STEMS = [
    "causal_conv1d",
    "gated_delta_rule",
    "gated_rms_norm",
    "l2_norm",
    "linear_kl",
    "mamba2",
    "mla_absorb",
    "mla_attention",
    "mla_prefill",
    "rms_norm",
    "sampling",
    "skinny_linear",
    "ssd",
    "swiglu",
]
HERE = Path(__file__).parent
_LOG_WIDTH = 160  # of the table where nobody watches: a log of 80 columns cuts its numbers


class BadArgument(Exception):
    """A mistake of the caller; the message is the sentence to print."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time an op against its peers.")
    parser.add_argument("stem", help=f"one of {', '.join(STEMS)}")
    parser.add_argument("--case", nargs="+", action="extend", metavar="NAME", help="only these cases")
    parser.add_argument("--backend", nargs="+", action="extend", metavar="NAME", help="only these backends of ours")
    parser.add_argument("--peers", nargs="*", action="extend", metavar="NAME", help="only these peers")
    parser.add_argument("--out", type=Path, help="folder for STEM.json; bench/results/<gpu> by default")
    parser.add_argument("--append", action="store_true", help="keep the other cases of the file that is there")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    return parser.parse_args(arguments)


def choose(what: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """All that is known if None is wanted; names are separated by commas or come apart."""
    if wanted is None:
        return known
    names = [name for part in wanted for name in part.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadArgument(f"there is no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return names


def show(rows: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    headings = ("case", "pass", "gates", "backend", "eager us", "graph us", "host us", "roofline", "error", "best peer")
    table = Table(*headings, "ratio")
    for row in rows:
        table.add_row(
            *(row[name] for name in ("case", "pass", "gates", "backend")),
            *(number(row[name], ".1f") for name in ("us", "graph_us", "host_us")),
            number(row["roofline"], ".0%"),
            number(row["error"], ".1e"),
            row["best_peer"] or "-",
            number(row["ratio"], ".2f"),
        )
    console.print(table)
    for row in rows:
        for name, entry in {row["backend"]: row, **row["peers"]}.items():
            if "missing" in entry:
                console.print(f"{row['case']}, {row['pass']}, {row['gates']}: {name}: {entry['missing']}", markup=False)


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def earlier(file: Path, commit: str | None, gpu: str) -> dict[str, Any] | None:
    """What a run of the same commit on the same GPU has left in the file; None if there is no file.

    Raises:
        BadArgument: the file is of another commit or GPU.
    """
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    mine, theirs = (commit or record.commit(), gpu), (found["meta"]["commit"], found["meta"]["gpu"])
    if mine != theirs:
        raise BadArgument(
            f"{file} is of {' on '.join(theirs)}, this run is of {' on '.join(mine)}: they do not go together"
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    (stem,) = choose("benchmark", [options.stem], STEMS)
    module = importlib.import_module(f"bench.{stem}")
    by_name = {**module.CASES, **getattr(module, "EXTRA_CASES", {})}
    cases = choose("case", options.case, list(by_name)) if options.case else list(module.CASES)
    backends = choose("backend", options.backend, module.BACKENDS)
    chosen_peers = choose("peer", options.peers, list(module.PEERS))
    if not torch.cuda.is_available():
        raise BadArgument("the benchmarks need an NVIDIA GPU, and torch finds none here")
    gpu = torch.cuda.get_device_name()
    out = options.out or HERE / "results" / gpu.lower().replace(" ", "-")
    file = out / f"{stem}.json"
    result = earlier(file, options.commit, gpu) if options.append else None
    if result is None:
        reached = {
            "copy_bytes_per_second": timing.copy_bandwidth(),
            "product_flop_per_second": timing.product_flop_rate(),
            **getattr(module, "ceilings", dict)(),
        }
        result = {"meta": {**record.meta(options.commit), **reached}, "rows": []}
    roofs = Roofs(result["meta"]["copy_bytes_per_second"], result["meta"]["product_flop_per_second"])
    out.mkdir(parents=True, exist_ok=True)
    wrong = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in cases:
            begin = time.perf_counter()
            result["rows"] = [row for row in result["rows"] if row["case"] != name]
            try:  # the other cases are still worth their time
                for row in module.run(by_name[name], backends, chosen_peers, roofs):
                    result["rows"].append(row)
                    file.write_text(json.dumps(result, indent=1) + "\n")
            except AssertionError as problem:
                print(f"{name}: wrong: {problem}", file=sys.stderr)
                wrong.append(name)
            except torch.OutOfMemoryError as problem:
                print(f"{name}: does not fit: {str(problem).splitlines()[0]}", file=sys.stderr)
            torch.cuda.empty_cache()
            print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    show(result["rows"])
    print(file)
    if wrong:
        sys.exit(f"error: our results are wrong in {', '.join(wrong)}")


if __name__ == "__main__":
    try:
        main()
    except BadArgument as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
