"""A dry run: what permuquant would do with a model, before any calibration or packing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .backend import PASSES, Analysis, analyse
from .errors import Refused
from .options import Options
from .reporting import Report, Section
from .sections import dry_plan, scheme


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Trace ``model(*args, **kwargs)`` and report what would be folded and quantised.

    Nothing is packed and no weight is read, so meta tensors do; the model runs once, uncompiled,
    under ``no_grad``. Raises ``Refused`` if Dynamo traced no graph, as for a bare ``nn.Linear``.
    """
    parsed = Options.parse(options)
    found: list[tuple[Analysis, float]] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        found.append((analyse(module, example_inputs, parsed), time.perf_counter() - start))
        return module.forward

    original = getattr(model, "_orig_mod", model)
    start = time.perf_counter()
    with torch.no_grad():
        traced: Any = torch.compile(original, backend=record)
        traced(*args, **kwargs)
    elapsed = time.perf_counter() - start
    if not found:
        raise Refused(
            "permuquant: Dynamo traced no graph here; wrap the model in an nn.Module of your own "
            "(a bare nn.Linear or nn.Sequential reaches no backend)"
        )
    tracing = elapsed - sum(seconds for _, seconds in found)
    sections = [_section(analysis, {"analyse": seconds}, parsed) for analysis, seconds in found]
    sections[0].seconds["trace"] = tracing  # type: ignore[index]
    return Report(tuple(sections), parsed)


def _section(analysis: Analysis, seconds: dict[str, float], options: Options) -> Section:
    needs = analysis.program.needs
    plan = dry_plan(PASSES, needs, options)
    sizes = analysis.weight_bytes
    packed = {
        one.linear.weight: one.linear.in_features
        * one.linear.out_features
        * one.bits_per_weight
        / 8
        for one in plan.linears
        if one.bits_per_weight is not None and one.linear.weight in needs.packed
    }
    kept = sum(size for name, size in sizes.items() if name not in packed or name in needs.dense)
    return Section(
        plan=plan,
        groups=needs.groups,
        phase="dry run",
        scheme=scheme(options),
        calibration_calls=0,
        weight_bytes_before=sum(sizes.values()),
        weight_bytes_after=int(sum(packed.values())) + kept,
        seconds=seconds,
    )
