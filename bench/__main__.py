"""python -m bench STEM [--case NAME ...] [--peers NAME ...] [--out DIR]: prints a table, writes STEM.json."""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import timing
from hylo.provenance import source_commit

STEMS = ["gated_rms_norm"]
HERE = Path(__file__).parent
PACKAGES = ["hylo", "torch", "triton", "cuda-core", "nvidia-cuda-nvrtc", "flash-linear-attention", "mamba-ssm"]


class BadArgument(Exception):
    """A mistake of the caller; the message is the sentence to print."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time an op against its peers.")
    parser.add_argument("stem", help=f"one of {', '.join(STEMS)}")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these cases")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="only these peers")
    parser.add_argument("--out", type=Path, help="folder for STEM.json; bench/results/<gpu> by default")
    parser.add_argument("--commit", help="what the result is of, where there is no git to ask")
    return parser.parse_args(arguments)


def choose(what: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise BadArgument(f"there is no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return known if wanted is None else wanted


def meta(commit: str | None, bandwidth: float) -> dict[str, Any]:
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
        "copy_bytes_per_second": bandwidth,
        "versions": versions,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("case", "dtype", "eager us", "graph us", "host us", "roofline", "error", "best peer", "ratio")
    for row in rows:
        table.add_row(
            row["case"],
            row["dtype"],
            f"{row['us']:.1f}",
            "-" if row["graph_us"] is None else f"{row['graph_us']:.1f}",
            f"{row['host_us']:.1f}",
            f"{row['roofline']:.0%}",
            f"{row['error']:.1e}",
            row["best_peer"] or "-",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    console = Console()
    console.print(table)
    for row in rows:
        for name, entry in row["peers"].items():
            if "missing" in entry:
                console.print(f"{row['case']}: {name}: {entry['missing']}")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    (stem,) = choose("benchmark", [options.stem], STEMS)
    module = importlib.import_module(f"bench.{stem}")
    cases = choose("case", options.case, list(module.CASES))
    chosen_peers = choose("peer", options.peers, list(module.PEERS))
    if not torch.cuda.is_available():
        raise BadArgument("the benchmarks need an NVIDIA GPU, and torch finds none here")
    bandwidth = timing.copy_bandwidth()
    rows = [module.run(module.CASES[name], chosen_peers, bandwidth) for name in cases]
    result = {"meta": meta(options.commit, bandwidth), "rows": rows}
    gpu = result["meta"]["gpu"].lower().replace(" ", "-")
    out = options.out or HERE / "results" / gpu
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    print(out / f"{stem}.json")


if __name__ == "__main__":
    try:
        main()
    except BadArgument as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
