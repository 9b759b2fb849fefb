"""python -m bench STEM [--case NAMES] [--backend NAMES] [--peers NAMES] [--out DIR]: prints a table, writes STEM.json.

Several names are separated by commas or spaces. The file is written anew after every case, so that a run that is
stopped keeps what it has.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import timing
from bench.contest import Roofs
from hylo.provenance import source_commit

STEMS = ["gated_delta_rule", "gated_rms_norm"]
HERE = Path(__file__).parent
PACKAGES = [
    *("hylo", "torch", "triton", "cuda-core", "nvidia-cuda-nvrtc"),
    *("flash-linear-attention", "fla-core", "flash-qla", "tilelang", "flashinfer-python", "nvidia-cutlass-dsl"),
    "mamba-ssm",
]


class BadArgument(Exception):
    """A mistake of the caller; the message is the sentence to print."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time an op against its peers.")
    parser.add_argument("stem", help=f"one of {', '.join(STEMS)}")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="only these backends of ours")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these peers")
    parser.add_argument("--out", type=Path, help="folder for STEM.json; bench/results/<gpu> by default")
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


def meta(commit: str | None, roofs: Roofs) -> dict[str, Any]:
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit or source_commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "copy_bytes_per_second": roofs.bytes_per_second,
        "product_flop_per_second": roofs.flop_per_second,
        "versions": versions,
    }


def show(rows: list[dict[str, Any]]) -> None:
    console = Console()
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


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    (stem,) = choose("benchmark", [options.stem], STEMS)
    module = importlib.import_module(f"bench.{stem}")
    cases = choose("case", options.case, list(module.CASES))
    backends = choose("backend", options.backend, module.BACKENDS)
    chosen_peers = choose("peer", options.peers, list(module.PEERS))
    if not torch.cuda.is_available():
        raise BadArgument("the benchmarks need an NVIDIA GPU, and torch finds none here")
    roofs = Roofs(timing.copy_bandwidth(), timing.product_flop_rate())
    result: dict[str, Any] = {"meta": meta(options.commit, roofs), "rows": []}
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu
    out.mkdir(parents=True, exist_ok=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in cases:
            begin = time.perf_counter()
            result["rows"] += module.run(module.CASES[name], backends, chosen_peers, roofs)
            (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    show(result["rows"])
    print(out / f"{stem}.json")


if __name__ == "__main__":
    try:
        main()
    except BadArgument as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
