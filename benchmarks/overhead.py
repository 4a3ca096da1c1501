"""What a call costs on the host: ours against torch.compile alone."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from . import timing
from .steady import Step

Record = dict[str, Any]


def outside(step: Step, repetitions: int) -> float:
    """Milliseconds that our graphs spend outside the callables they compiled: least of many."""
    from pq_compile.runtime import CompiledGraph

    spent = {"all": 0.0, "inside": 0.0}

    def clocked(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    graphs = [o for o in gc.get_objects() if type(o) is CompiledGraph and o.compiled is not None]
    before, own = CompiledGraph.__call__, [graph.compiled for graph in graphs]
    took = []
    try:
        CompiledGraph.__call__ = clocked(before, "all")  # type: ignore[method-assign]
        for graph, compiled in zip(graphs, own, strict=True):
            graph.compiled = clocked(compiled, "inside") if compiled else None
        for _ in range(repetitions):
            timing.synchronise()
            spent.update(all=0.0, inside=0.0)
            step()
            took.append(spent["all"] - spent["inside"])
    finally:
        CompiledGraph.__call__ = before  # type: ignore[method-assign]
        for graph, compiled in zip(graphs, own, strict=True):
            graph.compiled = compiled
    return 1e3 * min(took)
