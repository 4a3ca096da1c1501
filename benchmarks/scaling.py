"""One compiled model over resolutions and batches, ours against torch.compile in the same process.

Both sides are compiled with dynamic sizes, once; a size that compiles anew is recorded as such.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import models, timing
from .models import Model, Work
from .sides import own_world
from .steady import Protocol, Side, Step, first_call, ready

Record = dict[str, Any]

WORKS = (
    Work(512),
    Work(1024),
    Work(1536),
    Work(2048),
    Work(1024, 2),
    Work(1024, 4),
)


def measure(
    sides: Sequence[Side],
    model: Model,
    protocol: Protocol,
    device: str,
    works: Sequence[Work] | None = None,
    saved: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """A record for each side; ``saved`` is called after every one."""
    records = []
    for side in sides:
        start = time.perf_counter()
        with own_world(side, protocol):
            record = _side(side, model, protocol, device, works or WORKS)
        record["took_s"] = time.perf_counter() - start
        records.append(record)
        saved(record)
    return records


def _side(
    side: Side, model: Model, protocol: Protocol, device: str, works: Sequence[Work]
) -> Record:
    record: Record = {"side": side.name, "kind": side.kind, "works": []}
    built = models.build(model, device)
    given = models.inputs(model, works[0], device)
    models.call(built, given)()
    _, fast = ready(side, built, given, protocol, record)
    for work in works:
        step: Step = models.call(fast, models.inputs(model, work, device))
        found: Record = {"resolution": work.resolution, "batch": work.batch}
        try:
            found["compile"] = first_call(step)
            found |= timing.steps(step, protocol.repetitions)
        except torch.OutOfMemoryError as error:
            found["missing"] = str(error).partition(".")[0]
        record["works"].append(found)
        print(f"    {side.name}, {work}: {_said(found)}", flush=True)
    return record


def _said(found: Record) -> str:
    if "missing" in found:
        return str(found["missing"])
    graphs = found["compile"]["graphs"]
    again = f", {graphs} graphs compiled" if graphs else ""
    return f"{found['wall_ms']['median']:.1f} ms{again}"
