"""What every benchmark does: right results first, then the clocks in turn, then the rows of the result file."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import timing
from bench.peers import Missing
from bench.timing import Call
from hylo_ops.testing import DTYPE_NAMES, relative_error

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Roofs:
    """What this very machine reaches: bytes read and written a second by a copy, FLOP a second by a bf16 product."""

    bytes_per_second: float
    flop_per_second: float


@dataclass(frozen=True)
class Work:
    """What one call cannot do without."""

    bytes: int
    flop: int

    def floor_us(self, roofs: Roofs) -> float:
        return 1e6 * max(self.bytes / roofs.bytes_per_second, self.flop / roofs.flop_per_second)


@dataclass(frozen=True)
class Contestant:
    """One implementation, ours or a peer's, on the inputs of one row.

    Args:
        check: computes what is compared with float64, under the names of the exact results. Raises peers.Missing or
            NotImplementedError where the implementation is not there or cannot run the inputs.
        start: gives the call that is timed; what the call needs but the clock must not see happens here.
        whole: the call whose memory counts, where that is more than the timed one.
    """

    check: Callable[[], Results]
    start: Callable[[], Call]
    whole: Call | None = None


@dataclass
class Side:
    """Ours by backend, or the peers by name: an entry for each, and those that take part."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    able: dict[str, Contestant] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        self.entries[name] = {"missing": reason}
        self.able.pop(name, None)


def prepare_ours(contestants: Mapping[str, Contestant], exact: Results, accept: Callable[[Results], None]) -> Side:
    """Backends that cannot run the inputs are missing, with their reason; a wrong result ends the run.

    Raises:
        AssertionError: by `accept`, which gets what each backend computes.
    """
    side = Side()
    for name, contestant in contestants.items():
        try:
            results = contestant.check()
        except NotImplementedError as reason:
            side.drop(name, str(reason))
            continue
        accept(results)
        side.entries[name], side.able[name] = _errors(results, exact), contestant
    return side


def prepare_peers(contestants: Mapping[str, Contestant], exact: Results, limit: float) -> Side:
    """Only peers that are present and right take part; one that breaks must not end the run of the others."""
    side = Side()
    for name, contestant in contestants.items():
        try:
            entry = _errors(contestant.check(), exact)
        except Missing as reason:
            side.drop(name, str(reason))
        except Exception as problem:
            side.drop(name, _failure(problem))
        else:
            if entry["error"] > limit:
                worst = max(entry["errors"], key=entry["errors"].__getitem__)
                side.drop(name, f"disagrees with float64: relative error {entry['error']:.1e} of {worst}")
            else:
                side.entries[name], side.able[name] = entry, contestant
    return side


def prepare(
    what: str, ours: Mapping[str, Contestant], peers: Mapping[str, Contestant], exact: Results, limit: float
) -> tuple[Side, Side]:
    """Both sides with their errors, ready for the clocks, where one limit holds for all.

    Raises:
        AssertionError: a backend of ours is further from `exact` than the limit; it begins with `what`.
    """

    def accept(results: Results) -> None:
        for name, result in results.items():
            error = relative_error(result, exact[name])
            assert error <= limit, f"{what}: error {error:.1e} of {name}"

    return prepare_ours(ours, exact, accept), prepare_peers(peers, exact, limit)


def described(case: Any, pass_: str) -> dict[str, Any]:
    """What the rows of a case without states and gates of its own begin with."""
    dtype = DTYPE_NAMES[case.dtype]
    of_case = {"case": case.name, "shape": case.shape, "dtype": dtype, "state_dtype": dtype}
    return {**of_case, "gates": "-", "pass": pass_}


def rows(
    common: dict[str, Any], ours: Side, peers: Side, work: Work, roofs: Roofs, *, seconds: float, host: bool
) -> Iterator[dict[str, Any]]:
    """Starts the clocks over all that take part, and gives one row for each of our backends.

    Args:
        common: what the rows share: case, shape, dtype, state_dtype, gates, pass.
        seconds: about how long the clocks run.
        host: whether a call's time on the host is of interest.
    """
    _time(ours, peers, seconds, host)
    for name, entry in ours.entries.items():
        row = {**common, "backend": name, **_NOT_RUN, **entry, "bytes": work.bytes, "flop": work.flop}
        if "missing" not in entry:
            row["roofline"] = work.floor_us(roofs) / best_us(entry)
        yield {**row, "peers": peers.entries, **comparison(entry, peers.entries)}


_NOT_RUN = dict.fromkeys(("us", "graph_us", "host_us", "bytes", "flop", "roofline", "error", "peak_bytes"))


def _time(ours: Side, peers: Side, seconds: float, host: bool) -> None:
    """Adds the times and the memory of all that take part to their entries."""
    calls: dict[str, Call] = {}
    for side in (ours, peers):
        for name, contestant in list(side.able.items()):
            try:
                call = contestant.start()
                side.entries[name]["peak_bytes"] = timing.peak_bytes(contestant.whole or call)
                calls[name] = call
            except torch.OutOfMemoryError as problem:
                side.drop(name, _failure(problem))
                torch.cuda.empty_cache()
            except Exception as problem:
                if side is ours:
                    raise
                side.drop(name, _failure(problem))
    entries = {**ours.entries, **peers.entries}
    for name, times in timing.rotate(calls, seconds).items():
        entries[name].update(times)
        entries[name]["host_us"] = timing.host_us(calls[name]) if host else None


def _errors(results: Results, exact: Results) -> dict[str, Any]:
    assert results.keys() == exact.keys(), f"got {sorted(results)}, float64 has {sorted(exact)}"
    errors = {name: relative_error(result, exact[name]) for name, result in results.items()}
    return {"error": max(errors.values()), "errors": errors}


def _failure(problem: Exception) -> str:
    return f"failed: {type(problem).__name__}: {' '.join(str(problem).splitlines()[:1])}"


def best_us(times: dict[str, Any]) -> float:
    return times["us"] if times["graph_us"] is None else times["graph_us"]


def with_rates(entry: dict[str, Any], work: Work) -> dict[str, Any]:
    """With the bytes and FLOP a second of what was timed, where somebody was."""
    if "missing" in entry:
        return entry
    seconds = 1e-6 * best_us(entry)
    return {**entry, "bytes_per_second": work.bytes / seconds, "flop_per_second": work.flop / seconds}


def with_all_rates(row: dict[str, Any], work: Work) -> dict[str, Any]:
    """A row and its peers' entries `with_rates` of the same work."""
    entries = {name: with_rates(entry, work) for name, entry in row["peers"].items()}
    return with_rates({**row, "peers": entries}, work)


def comparison(ours: dict[str, Any], entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The best peer's time over ours, by graph where both sides were captured, else eager."""
    present = {name: entry for name, entry in entries.items() if "missing" not in entry}
    if not present or "missing" in ours:
        return {"mode": None, "best_peer": None, "ratio": None}
    best = min(present, key=lambda name: best_us(present[name]))
    captured = ours["graph_us"] is not None and present[best]["graph_us"] is not None
    column = "graph_us" if captured else "us"
    mode = "graph" if captured else "eager"
    return {"mode": mode, "best_peer": best, "ratio": present[best][column] / ours[column]}
