"""Clocks: device time of eager calls and of CUDA graphs, rotated over contestants; host time; what the card reaches.

A graph is captured on the current stream, which must not be the default one: autograd runs a backward on the stream of
its forward, and only there can it be captured.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]

ROUNDS, FEWEST_ROUNDS = 20, 5
CALLS_A_ROUND = 20
HOST_CALLS = 10_000
LONGEST_CAPTURED_US = 200_000  # a longer call hides what the host does, and a graph has memory of its own
_DRAIN_EVERY = 200  # launches; well under the launch queue's depth, so that a call never waits for the device


class Rotation:
    """Calls that take turns, each on memory of its own: with enough of it, none finds in the L2 what it reads.

    `rotate` times whole turns of them.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._count = len(calls)
        self._next = itertools.cycle(calls)

    def __len__(self) -> int:
        return self._count

    def __call__(self) -> object:
        return next(self._next)()


def cold_copies(first: Tensor, cold_bytes: int) -> tuple[Tensor, ...]:
    """It and so many more of it, `cold_bytes` together, that none is in a cache of the GPU when its turn comes."""
    return (first, *(first.clone() for _ in range(-(-cold_bytes // first.nbytes) - 1)))


def device_us(call: Call, calls: int) -> float:
    """Microseconds a call, by events around `calls` of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end) / calls


def capture(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of so many calls. Raises where the call cannot be captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            call()
    return graph


def rotate(calls: Mapping[str, Call], seconds: float) -> dict[str, dict[str, float | str | None]]:
    """Medians over rounds; in each round every contestant runs once, eager and as a graph.

    Args:
        seconds: about how long the rounds take; long calls get fewer of them, but never under FEWEST_ROUNDS.
    Returns:
        Per name `us` and `graph_us`, microseconds a call; `graph_us` is None, with `graph_error`, where capture failed
        and for a call over LONGEST_CAPTURED_US.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    results: dict[str, dict[str, float | str | None]] = {}
    if not calls:
        return results
    for call in calls.values():
        call()  # compiles, autotunes
    turns = max(len(call) if isinstance(call, Rotation) else 1 for call in calls.values())
    first_us = {name: device_us(call, 3) for name, call in calls.items()}
    rounds, calls_a_round = plan(sum(first_us.values()), seconds, turns)
    for name, call in calls.items():
        device_us(call, calls_a_round)  # warms up
        results[name] = {"us": None, "graph_us": None}
        if first_us[name] > LONGEST_CAPTURED_US:
            results[name]["graph_error"] = "not captured: the host's part of so long a call is nothing"
            continue
        try:
            torch.cuda.empty_cache()  # a graph's memory is its own, eager calls' is not for it
            graphs[name] = capture(call, calls_a_round)
        except Exception as error:  # each library has its own
            torch.cuda.synchronize()
            results[name]["graph_error"] = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
    if graphs and not fit_beside(calls, calls_a_round):
        for name in graphs:
            results[name]["graph_error"] = "no memory for graphs beside eager calls"
        graphs.clear()
        torch.cuda.empty_cache()
    eager: dict[str, list[float]] = {name: [] for name in calls}
    replayed: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, call in calls.items():
            eager[name].append(device_us(call, calls_a_round))
            if name in graphs:
                replayed[name].append(device_us(graphs[name].replay, 1) / calls_a_round)
    for name in calls:
        results[name]["us"] = statistics.median(eager[name])
        if name in graphs:
            results[name]["graph_us"] = statistics.median(replayed[name])
    return results


def fit_beside(calls: Mapping[str, Call], calls_a_round: int) -> bool:
    """Whether eager calls have the memory that they need beside the graphs that were captured."""
    try:
        for call in calls.values():
            device_us(call, calls_a_round)
    except torch.OutOfMemoryError:
        return False
    return True


def plan(sweep_us: float, seconds: float, turns: int = 1) -> tuple[int, int]:
    """(rounds, calls a round) that fit the time, where one call of every contestant takes `sweep_us` together.

    Args:
        turns: what the calls a round are a multiple of, however many that makes.
    """
    sweeps = int(seconds * 1e6 / (2 * sweep_us))  # each is run eager and as a graph
    calls_a_round = -(-min(max(sweeps // ROUNDS, 1), CALLS_A_ROUND) // turns) * turns
    return min(max(sweeps // calls_a_round, FEWEST_ROUNDS), ROUNDS), calls_a_round


def host_us(call: Call) -> float:
    """Median microseconds from call to return, over HOST_CALLS calls, while the device keeps up."""
    for _ in range(_DRAIN_EVERY):
        call()
    samples = []
    for i in range(HOST_CALLS):
        if i % _DRAIN_EVERY == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - begin)
    torch.cuda.synchronize()
    return statistics.median(samples) / 1000


def peak_bytes(call: Call) -> int:
    """Device memory that one call takes beyond what is held before it; the first call compiles and does not count."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 4 GiB: the roof of this very machine."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = statistics.median(device_us(lambda: target.copy_(source), 5) for _ in range(5))
    return 2 * source.numel() / (rate * 1e-6)


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GiB: what a kernel that reads much and writes little has for a roof."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    rate = statistics.median(device_us(source.sum, 5) for _ in range(5))
    return source.nbytes / (rate * 1e-6)


def product_flop_rate() -> float:
    """FLOP a second of a bf16 matrix product of 8192 cubed: the other roof of this very machine."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    rate = statistics.median(device_us(lambda: a @ b, 10) for _ in range(5))
    return 2 * size**3 / (rate * 1e-6)
