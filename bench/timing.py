"""Clocks: device time of eager calls and of CUDA graphs, rotated over contestants; host time of a call; bandwidth."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]

ROUNDS = 20
CALLS_A_ROUND = 20
HOST_CALLS = 10_000
_DRAIN_EVERY = 200  # launches; well under the launch queue's depth, so that a call never waits for the device


def device_us(call: Call, calls: int) -> float:
    """Microseconds a call, by events around `calls` of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return 1000 * begin.elapsed_time(end) / calls


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of CALLS_A_ROUND calls. Raises RuntimeError where the call cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_A_ROUND):
            call()
    return graph


def rotate(calls: Mapping[str, Call]) -> dict[str, dict[str, float | str | None]]:
    """Medians over rounds; in each round every contestant runs once, eager and as a graph.

    Returns:
        Per name `us` and `graph_us`, microseconds a call; `graph_us` is None, with `graph_error`, where capture failed.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    results: dict[str, dict[str, float | str | None]] = {}
    for name, call in calls.items():
        device_us(call, CALLS_A_ROUND)  # compiles, autotunes, warms up
        results[name] = {"us": None, "graph_us": None}
        try:
            graphs[name] = capture(call)
        except RuntimeError as error:
            torch.cuda.synchronize()
            results[name]["graph_error"] = str(error).splitlines()[0]
    eager: dict[str, list[float]] = {name: [] for name in calls}
    replayed: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            eager[name].append(device_us(call, CALLS_A_ROUND))
            if name in graphs:
                replayed[name].append(device_us(graphs[name].replay, 1) / CALLS_A_ROUND)
    for name in calls:
        results[name]["us"] = statistics.median(eager[name])
        if name in graphs:
            results[name]["graph_us"] = statistics.median(replayed[name])
    return results


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
    """Device memory that one call takes beyond what is held before it."""
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
