"""The kernels of a step, from a trace of torch.profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import kinds
from .kinds import Launch

Record = dict[str, Any]
LISTED = 60  # kernels that a record names, the longest first

FIRST_OPERAND = {
    "aten::mm": 0,
    "aten::addmm": 1,
    "aten::linear": 0,
    "aten::_scaled_mm": 0,
    "aten::_addmm_activation": 1,
}
"""Operator that launches a vendor's GEMM -> which argument holds its rows."""

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def trace(call: Callable[[], object], steps: int) -> list[Record]:
    """The events of ``steps`` calls, as torch.profiler's trace file lists them."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[Record] = json.loads(path.read_text())["traceEvents"]
    return events


def launches(events: Sequence[Mapping[str, Any]], steps: int) -> list[Launch]:
    """The kernels of one step, longest first.

    Operator and kernel share an "External id". That gives the rows of the product a kernel is part
    of, and so tells the products with the one row of a sample from the others.
    """
    rows = {
        event["args"]["External id"]: _rows(event)
        for event in events
        if event.get("cat") == "cpu_op" and event["name"] in FIRST_OPERAND
    }
    found: dict[tuple[str, int | None], list[float]] = {}
    for event in events:
        if event.get("cat") in ON_DEVICE:
            key = (event["name"], rows.get(event.get("args", {}).get("External id")))
            found.setdefault(key, []).append(event["dur"] / 1e3)
    listed = [
        Launch(name, sum(took) / steps, len(took) / steps, of) for (name, of), took in found.items()
    ]
    return sorted(listed, key=lambda one: -one.milliseconds)


def _rows(event: Mapping[str, Any]) -> int | None:
    shapes: Sequence[Sequence[int]] = event["args"].get("Input Dims", ())
    at = FIRST_OPERAND[event["name"]]
    return prod(shapes[at][:-1]) if len(shapes) > at and shapes[at] else None


def profiled(call: Callable[[], object], steps: int = 2) -> Record:
    """Kernel time of one step, its split by kind, its launches, and the longest kernels."""
    found = launches(trace(call, steps), steps)
    if not found:
        return {"unavailable": "the profiler saw no kernel on the device"}
    return {
        "kernel_ms": sum(one.milliseconds for one in found),
        "split_ms": kinds.split(found),
        "launches": sum(one.times for one in found),
        "kernels": [
            {
                "name": one.name[:160],
                "kind": kinds.kind(one.name, one.rows),
                "ms": one.milliseconds,
                "count": one.times,
                "rows": one.rows,
            }
            for one in found[:LISTED]
        ],
    }
