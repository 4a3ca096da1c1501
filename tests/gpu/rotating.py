"""How long products of a few rows take on a CUDA device: in a graph, alone, and on the host.

Weights rotate beyond the L2 cache, so that each is read from memory.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pq_compile.kernels import KernelSpec, launch, matmul_w4a16
from tests.gpu.check_kernels import Packed

ROTATED = 400e6
"""Bytes of weights that a round of launches reads."""


class Operands:
    """As many weights as ``ROTATED`` bytes hold, packed and in bfloat16."""

    def __init__(self, rows: int, n: int, k: int) -> None:
        self.rows, self.n = rows, n
        self.x = torch.randn(rows, k, device="cuda").bfloat16()
        self.bias = torch.randn(n, device="cuda").bfloat16()
        self.y = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
        self.dense = [
            torch.randn(n, k, device="cuda").bfloat16()
            for _ in range(max(4, math.ceil(ROTATED / (2 * n * k))))
        ]
        self.packed: list[Packed] = [
            (
                torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"),
                torch.randint(0x30, 0x48, (n, k // 16), dtype=torch.uint8, device="cuda"),
                torch.full((), 0.01, device="cuda"),
            )
            for _ in range(max(4, math.ceil(ROTATED / (0.5625 * n * k))))
        ]

    def launches(self, spec: KernelSpec) -> list[Callable[[], object]]:
        def call(w: Packed) -> Callable[[], object]:
            return lambda: launch(spec, self.rows, self.n, self.x, *w, self.bias, self.y)

        return [call(w) for w in self.packed]

    def product(self) -> Tensor:
        """What a compiled graph calls."""
        return matmul_w4a16(self.x, self.packed[0], self.bias, "w4a16_vector")

    def linears(self) -> list[Callable[[], object]]:
        def call(w: Tensor) -> Callable[[], object]:
            return lambda: torch.nn.functional.linear(self.x, w, self.bias)

        return [call(w) for w in self.dense]


def in_graph(calls: Sequence[Callable[[], object]], launches: int = 60) -> float:
    """Microseconds a call, of ``launches`` in one CUDA graph: the median of replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            calls[i % len(calls)]()
    took = []
    for _ in range(7):
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(end) * 1e3 / launches)
    return float(statistics.median(took[1:]))


def kernel_time(calls: Sequence[Callable[[], object]], rounds: int = 3) -> float:
    """Microseconds that the kernels of one call run, from the profiler: the mean of calls."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(rounds):
            for call in calls:
                call()
        torch.cuda.synchronize()
    events = found.events() or ()
    on_device = [event for event in events if str(event.device_type).endswith("CUDA")]
    took = [float(event.device_time_total) for event in on_device]
    return sum(took) / (rounds * len(calls)) if sum(took) else math.nan


def on_host(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of Python a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(200):
        calls[i % len(calls)]()
    took = (time.perf_counter() - start) / 200 * 1e6
    torch.cuda.synchronize()
    return took
