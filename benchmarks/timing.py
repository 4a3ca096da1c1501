"""Clocks: whole steps, kernels on rotating buffers, the host's share, a device-to-device copy.

A *spread* is ``{"median", "low", "high", "count"}`` in milliseconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]
Call = Callable[[], object]

WARM = 3
CACHES = 4  # the buffers of a rotation hold this many times the L2 cache
MOST_SETS = 48
CPU_CACHE = 1 << 22  # stands for L2 where there is no GPU


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> Record:
    return {
        "median": median(values),
        "low": min(values),
        "high": max(values),
        "count": len(values),
    }


def seconds(call: Call) -> tuple[float, Any]:
    """How long ``call`` takes to the end of its work on the GPU, and what it returned."""
    synchronise()
    start = time.perf_counter()
    result = call()
    synchronise()
    return time.perf_counter() - start, result


def steps(call: Call, repetitions: int, warm: int = WARM) -> Record:
    """Spreads of the wall clock and, on a GPU, of CUDA events around single calls."""
    for _ in range(warm):
        call()
    wall = [1e3 * seconds(call)[0] for _ in range(repetitions)]
    found: Record = {"wall_ms": spread(wall)}
    if torch.cuda.is_available():
        found["event_ms"] = spread([_between_events(call) for _ in range(repetitions)])
    return found


def _between_events(call: Call) -> float:
    start, end = _event(), _event()
    synchronise()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def host(call: Call, repetitions: int) -> float:
    """Milliseconds until ``call`` returns, not waiting for the GPU: the least of many."""
    took = []
    for _ in range(repetitions):
        synchronise()
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    synchronise()
    return 1e3 * min(took)


def sets(bytes_per_call: int) -> int:
    """How many sets of buffers a rotation needs so that none is in the cache when read again."""
    cache = CPU_CACHE
    if torch.cuda.is_available():
        cache = torch.cuda.get_device_properties().L2_cache_size
    return min(MOST_SETS, max(2, -(-CACHES * cache // max(1, bytes_per_call))))


def rotating(calls: Sequence[Call], repetitions: int = 7) -> Record:
    """A spread of one of ``calls``, each with buffers of its own, run one after the other.

    On a GPU they are captured into one CUDA graph, so that no launch from the host is waited for;
    what they return is kept, so that outputs rotate too.
    """
    for call in calls:
        call()
    synchronise()
    if torch.cuda.is_available():
        replay, kept = _captured(calls)
        replay()
        took = [_between_events(replay) for _ in range(repetitions)]
        del kept
    else:
        took = [1e3 * seconds(_one_by_one(calls))[0] for _ in range(repetitions)]
    return spread([one / len(calls) for one in took])


def _captured(calls: Sequence[Call]) -> tuple[Call, list[object]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return graph.replay, [graph, *kept]


def _one_by_one(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def copy_rate(bytes_moved: int, device: str, repetitions: int = 7) -> float:
    """GB/s of device-to-device copies that read and write ``bytes_moved`` bytes together.

    The faster of two ways: in a CUDA graph ``copy_`` is left to the copy engine, which reached 2.8
    TB/s on an H200 where kernels reach 4.2; so a kernel that only inverts bits copies as well.
    """
    half = max(16, bytes_moved // 2) // 8
    count = sets(bytes_moved)
    pairs = [torch.zeros(2, half, dtype=torch.int64, device=device) for _ in range(count)]

    def engine(pair: Tensor) -> Call:
        return lambda: pair[1].copy_(pair[0])

    def kernel(pair: Tensor) -> Call:
        return lambda: torch.bitwise_not(pair[0], out=pair[1])

    ways = [[way(pair) for pair in pairs] for way in (engine, kernel)]
    least = min(rotating(calls, repetitions)["median"] for calls in ways)
    return float(16 * half / least / 1e6)


def allocated() -> int:
    """Bytes of live tensors on the GPU; 0 without one."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@contextmanager
def peak(into: Record, name: str) -> Iterator[None]:
    """Record the most bytes of live tensors inside, under ``name``; 0 without a GPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.synchronize()
        into[name] = torch.cuda.max_memory_allocated() if on_gpu else 0
