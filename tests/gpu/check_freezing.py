"""What freezing takes: seconds by stage, and the GPU's memory before, meanwhile and after.

    python -m tests.gpu.check_freezing result.json                          FLUX.1-dev, whole
    python -m tests.gpu.check_freezing result.json --double 4 --single 8    fewer blocks
    python -m tests.gpu.check_freezing result.json --small --device cpu     to see that it runs

Passes if freezing never takes more memory than a bf16 step and the largest weight do, and if what
stays is what the report says. On the CPU no memory is measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pq_compile
from benchmarks.models import FLUX, Work, build, emoji_flux, inputs
from pq_compile.released import Released
from tests.models import unit_of

Record = dict[str, Any]
SLACK = 1 << 20
"""Bytes that small tensors add: the allocator rounds each up to 512."""


def measure_freezing(model: nn.Module, given: Record, calls: int = 64, **options: Any) -> Record:
    """Observe ``model`` for ``calls`` steps with the keyword arguments ``given``, then freeze it.

    Bytes are those of torch's allocator; a step moves ``timestep``, if there is one, from 1 to 0.
    The model is frozen afterwards; nothing that serves it has been compiled.
    """
    device = next(model.parameters()).device
    weights = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    _run(model, [given])  # what libraries allocate once is not of a step
    idle = _allocated(device) - weights
    bf16 = _watched(device, lambda: _run(model, [given]))
    options = {"recipe": "permuquant", "progress": False, **options}
    fast: Any = torch.compile(
        model, backend="permuquant", options={**options, "calibration_calls": calls + 1}
    )
    first = _watched(device, lambda: _run(fast, [given]))
    steps = [_at(given, 1 - n / calls) for n in range(1, calls)]
    later = _watched(device, lambda: _run(fast, steps))
    unit = unit_of(model)
    statistics = _watched(device, unit.observer.finish)
    freeze = _watched(device, lambda: pq_compile.freeze(fast))
    report = pq_compile.report(fast).to_dict()
    after = _allocated(device) - idle
    resident = sum(report["memory"].values())
    return {
        "calls": calls,
        "options": options,
        "bytes of weights": weights,
        "largest weight": largest,
        "bf16 step": bf16,
        "first observed call, with tracing": first,
        "observed call": {**later, "seconds": later["seconds"] / max(1, calls - 1)},
        "statistics": statistics,  # once more within "freeze"
        "freeze": {**freeze, "stages": dict(unit.seconds)},
        "peak over bf16 peak": freeze["peak"] - bf16["peak"],
        "bytes after": after,
        "bytes by kind": report["memory"],
        "ratio": weights / resident,
        "orders accepted": sum(group["accepted"] for group in report["groups"]),
        "released": sum(isinstance(parameter, Released) for parameter in model.parameters()),
        "passed": device.type != "cuda"
        or (freeze["peak"] <= bf16["peak"] + largest and after <= resident + SLACK),
    }


def copy_rates(size: int = 1 << 30) -> Record:
    """GB/s from a GPU to fresh host memory: pageable, pinned, and through a pinned buffer."""
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    stage = torch.empty(1 << 26, dtype=torch.uint8, pin_memory=True)

    def staged() -> Tensor:
        copy = torch.empty(size, dtype=torch.uint8)
        for part, room in zip(source.split(1 << 26), copy.split(1 << 26), strict=True):  # type: ignore[no-untyped-call]
            room.copy_(stage[: len(part)].copy_(part))
        return copy

    def pinned() -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(source)

    ways = {"pageable": source.cpu, "staged": staged, "pinned": pinned}
    return {
        name: size / 1e9 / min(_watched(source.device, way)["seconds"] for _ in range(3))
        for name, way in ways.items()
    }


def _at(given: Record, timestep: float) -> Record:
    if "timestep" not in given:
        return given
    return {**given, "timestep": torch.full_like(given["timestep"], timestep)}


def _run(model: Callable[..., Any], steps: Sequence[Record]) -> None:
    with torch.no_grad():
        for given in steps:
            model(**given)


def _watched(device: torch.device, work: Callable[[], Any]) -> Record:
    """Seconds, and the most bytes allocated meanwhile."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"seconds": seconds, "peak": peak}


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="the shape of emoji-flux")
    parser.add_argument("--double", type=int)
    parser.add_argument("--single", type=int)
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--recipe", default="permuquant")
    parser.add_argument("--release", default="backup")
    asked = parser.parse_args()
    flux = (emoji_flux() if asked.small else FLUX).with_blocks(asked.double, asked.single)
    model = build(flux, asked.device)
    given = inputs(flux, Work(asked.resolution), asked.device)
    options = {"recipe": asked.recipe, "release_weights": asked.release}
    record = measure_freezing(model, given, asked.calls, **options)
    record["blocks"] = [asked.double, asked.single]
    if asked.device == "cuda":
        record |= {"device": torch.cuda.get_device_name(), "GB/s to the host": copy_rates()}
    text = json.dumps({"torch": torch.__version__, **record}, indent=1)
    asked.result.write_text(text + "\n")
    print(text)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
