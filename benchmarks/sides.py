"""One side of a comparison, measured: step, kernels, memory, host, what served."""

from __future__ import annotations

import contextlib
import gc
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import models, profiling, timing
from .machine import clocks
from .models import Model, Work
from .overhead import outside
from .steady import Protocol, Side, Step, ready

Record = dict[str, Any]

GUARDS = {
    name: getattr(torch._dynamo.config, name)
    for name in ("use_recursive_dict_tags_for_guards", "skip_tensor_guards_with_matching_dict_tags")
    if hasattr(torch._dynamo.config, name)
}
"""Dynamo's own settings, which the backend changes when it is imported: torch.compile alone is
measured with these."""


def measure(
    side: Side, model: Model, work: Work, protocol: Protocol, device: str, own: Tensor | None
) -> tuple[Record, Tensor]:
    """A record of everything measured, and the output; ``own`` is that of bf16 eager, if known."""
    start = time.perf_counter()
    record: Record = {"side": side.name, "kind": side.kind, "mode": side.mode}
    with own_world(side, protocol):
        built = models.build(model, device)
        given = models.inputs(model, work, device)
        models.call(built, given)()  # fills what a model computes once, such as Z-Image's angles
        record["built_s"] = time.perf_counter() - start
        step, fast = ready(side, built, given, protocol, record)
        output = step().float().cpu()
        record["output"] = _compared(output, own)
        record["memory"] |= {"allocated_bytes": timing.allocated()}
        with timing.peak(record["memory"], "peak_step_bytes"):
            step()
        if protocol.step:
            record |= timed(step, protocol, side)
        if side.kind == "permuquant":
            record |= _reported(fast)
            record["memory"] |= record.pop("resident")
        record["took_s"] = time.perf_counter() - start
    return record, output


@contextlib.contextmanager
def own_world(side: Side, protocol: Protocol) -> Iterator[None]:
    """Nothing compiled or held of the side before; Dynamo's own guards for sides not ours."""
    from torch._inductor.utils import fresh_cache

    forget()
    with contextlib.ExitStack() as stack:
        if protocol.cold:
            stack.enter_context(fresh_cache())
        if side.kind != "permuquant":
            stack.enter_context(torch._dynamo.config.patch(GUARDS))
        yield


def forget() -> None:
    """Drop compiled graphs and what they hold."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def timed(step: Step, protocol: Protocol, side: Side) -> Record:
    """Wall clock, events, the host's share, the kernels; clocks of the device under load."""
    record: Record = timing.steps(step, protocol.repetitions)
    record["host_ms"] = timing.host(step, 3 * protocol.repetitions)
    if side.kind == "permuquant":
        record["outside_us"] = 1e3 * outside(step, 3 * protocol.repetitions)
    record["clocks"] = under_load(step)
    if protocol.profile:
        record |= profiling.profiled(step)
    return record


def under_load(step: Step) -> Record:
    """The clocks while steps run."""
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(clocks)
        while not asked.done():
            step()
    timing.synchronise()
    return asked.result()


def _compared(output: Tensor, own: Tensor | None) -> Record:
    found: Record = {"finite": bool(output.isfinite().all()), "shape": list(output.shape)}
    if own is not None:
        found["distance"] = float((output - own).norm() / own.norm())
    return found


def _reported(fast: Any) -> Record:
    """How many linears each kernel serves, and the bytes that stay."""
    import pq_compile

    report = pq_compile.report(fast).to_dict()
    served = Counter(str(one["kernel"]) for one in report["linears"])
    resident = {"parameter_bytes": sum(report["memory"].values()), "parts": report["memory"]}
    return {
        "kernels_of_linears": dict(served),
        "by_reference": served["reference"],
        "scheme": report["summary"]["scheme"],
        "resident": resident,
    }
