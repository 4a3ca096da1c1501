"""A side of a comparison, and its way to the steady state: convert, observe, freeze, compile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import fp8, models, timing

Record = dict[str, Any]
Step = Callable[[], Tensor]

INDUCTOR = "inductor"

SCHEMES: dict[str, dict[str, str]] = {
    "auto": {"scheme": "auto"},
    "w4a8": {"scheme": "w4a8"},
    "w4a16": {"scheme": "w4a16"},
    "w4a4": {"scheme": "w4a4"},
    "w4a4-emulated": {"scheme": "w4a4", "route": "fp8"},
    "w4a4-exact": {"scheme": "w4a4", "route": "half"},
}
"""A scheme of the command line -> the options of the backend."""

COMPILERS = (
    "_compile.compile_inner",
    "OutputGraph.call_user_compiler",
    "compile_fx_inner",
    "create_aot_dispatcher_function",
    "async_compile.wait",
)
"""Phases whose seconds are kept of Dynamo's own count; outer ones hold inner ones."""


@dataclass(frozen=True)
class Side:
    """``kind`` is "eager", "inductor", "fp8" or "permuquant"; ``mode`` that of torch.compile."""

    kind: str
    scheme: str = ""
    mode: str = "default"
    recipe: str = "rtn"
    release: str = "backup"
    calls: int = 2  # observed before freezing, by recipes that need data

    @property
    def name(self) -> str:
        names = {"eager": "bf16 eager", "inductor": "bf16 torch.compile", "fp8": "fp8 rows"}
        name = names.get(self.kind, f"permuquant {self.scheme}")
        return name if self.mode == "default" else f"{name}, {self.mode}"

    @property
    def options(self) -> Record:
        """Of the backend."""
        return {
            **SCHEMES[self.scheme],
            "recipe": self.recipe,
            "release_weights": self.release,
            "calibration_calls": self.calls,
            "progress": False,
        }


@dataclass(frozen=True)
class Protocol:
    """What is measured of a side, and how often."""

    repetitions: int = 7
    step: bool = True
    profile: bool = True
    cold: bool = False  # compile with an empty cache of Inductor
    dynamic: bool | None = None


def ready(
    side: Side, model: nn.Module, given: models.Inputs, protocol: Protocol, record: Record
) -> tuple[Step, Any]:
    """The step in its steady state, and the compiled model; how it got there goes to ``record``."""
    record["memory"] = {"parameter_bytes": models.bytes_of(model)}
    if side.kind == "eager":
        return models.call(model, given), model
    if side.kind == "permuquant":
        return _frozen(side, model, given, protocol, record)
    if side.kind == "fp8":
        record["linears"] = len(fp8.convert(model, models.call(model, given)))
        record["memory"] = {"parameter_bytes": models.bytes_of(model)}
    mode = None if side.mode == "default" else side.mode
    fast = torch.compile(
        model, backend=INDUCTOR, fullgraph=True, mode=mode, dynamic=protocol.dynamic
    )
    step = models.call(fast, given)
    record["compile"] = first_call(step)
    return step, fast


def _frozen(
    side: Side, model: nn.Module, given: models.Inputs, protocol: Protocol, record: Record
) -> tuple[Step, Any]:
    """Observe, freeze, compile what serves."""
    import pq_compile
    from pq_compile.backend import permuquant

    def backend(module: torch.fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        mode = None if side.mode == "default" else side.mode
        return permuquant(module, examples, mode=mode, options=side.options)

    fast: Any = torch.compile(model, backend=backend, fullgraph=True, dynamic=protocol.dynamic)
    step = models.call(fast, given)
    freezing: Record = {"recipe": side.recipe, "release_weights": side.release}
    if side.recipe in ("rtn", "random"):
        with timing.peak(freezing, "peak_bytes"):
            freezing["first_call_s"] = timing.seconds(step)[0]
    else:
        with pq_compile.calibration(fast):
            freezing["observed_calls_s"] = [timing.seconds(step)[0] for _ in range(side.calls)]
            freezing["peak_observing_bytes"] = _peak()
            _reset_peak()
            start = time.perf_counter()
        timing.synchronise()
        freezing["freeze_s"] = time.perf_counter() - start
        freezing["peak_bytes"] = _peak()
    freezing["steps_s"] = pq_compile.report(fast).to_dict()["timings"]
    record["freezing"] = freezing
    record["compile"] = first_call(step)
    return step, fast


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def first_call(step: Step) -> Record:
    """Seconds of a call that compiles, the compiler's own count, and hits of Inductor's cache."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    counters.clear()
    compilation_time_metrics.clear()
    took, _ = timing.seconds(step)
    return {
        "first_call_s": took,
        "phases_s": {
            name: sum(compilation_time_metrics[name])
            for name in COMPILERS
            if name in compilation_time_metrics
        },
        "graphs": counters["stats"]["unique_graphs"],
        "cache_hits": counters["inductor"]["fxgraph_cache_hit"],
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
    }
