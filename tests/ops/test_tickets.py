"""Who shares counters: launches of one stream do, captured ones have theirs for themselves."""

import pytest
import torch

from hylo_ops.common import tickets as module

DEVICE = torch.device("cpu", 0)  # has an index, as CUDA devices have


class Streams:
    current, capturing = 1, False


@pytest.fixture
def streams(monkeypatch):
    now = Streams()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now.current, raising=False)
    monkeypatch.setattr(module, "_BLOCK", 64)
    for name, empty in (("_of_stream", {}), ("_for_graphs", {}), ("_full", [])):
        monkeypatch.setattr(module, name, empty)
    return now


def take(count):
    taken = module.tickets(count, DEVICE)
    assert taken.dtype == torch.int32
    assert len(taken) >= count
    assert not taken.any()
    return taken


def test_a_stream_keeps_its_counters(streams):
    first = take(10)
    assert take(20) is first
    streams.current = 2
    other = take(10)
    assert other is not first
    streams.current = 1
    assert len(take(len(first) + 1)) > len(first)


def test_captured_launches_share_with_nobody(streams):
    eager = take(10)
    streams.capturing = True
    parts = [take(24), take(24)]
    parts.append(take(24))  # does not fit in the block: made in the graph
    streams.capturing = False
    take(10)  # makes a new block, and keeps the one that graphs point into
    streams.capturing = True
    parts.append(take(24))
    addresses = [set(range(part.data_ptr(), part.data_ptr() + 4 * 24)) for part in (eager, *parts)]
    assert sum(map(len, addresses)) == len(set.union(*addresses))
    assert module._full


def test_a_capture_before_any_other_call(streams):
    streams.capturing = True
    first, second = take(10), take(10)
    assert first.data_ptr() != second.data_ptr()
    assert not module._for_graphs
