"""What was done to a model and why, as a dict, as text and as one HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from . import html as web
from . import table
from .dump import write_whole
from .options import Options
from .plan import Group, Groups, LinearPlan, Plan, Verdict


@dataclass(frozen=True)
class Section:
    """One frozen unit: linears that were calibrated and planned together."""

    plan: Plan
    groups: Groups
    phase: str  # "observing 12 of 64", "serving", "dry run"
    scheme: str  # what "auto" became: "w4a4", "w4a16"
    calibration_calls: int  # observed so far
    weight_bytes_before: int
    weight_bytes_after: int
    seconds: Mapping[str, float] = field(default_factory=dict)  # step -> how long it took
    memory: Mapping[str, int] = field(default_factory=dict)  # what -> bytes
    kernels: Mapping[str, str] = field(default_factory=dict)  # linear -> the kernel it runs
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """``str()`` for a terminal, ``to_dict()`` for tools, ``to_html(path)`` to look at."""

    sections: tuple[Section, ...]
    options: Options

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. Only what stands under ``timings`` differs between equal runs."""
        linears = [entry for section in self.sections for entry in _linears(section)]
        return {
            "summary": _summary(self.sections, self.options, linears),
            "linears": linears,
            "groups": [entry for section in self.sections for entry in _groups(section)],
            "memory": _added(section.memory for section in self.sections),
            "timings": _added(section.seconds for section in self.sections),
        }

    def __str__(self) -> str:
        return table.text(self.to_dict())

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def to_html(self, path: str | Path) -> None:
        """Write one file that needs no network and no scripts; folders on the way are made.

        Raises ``Refused`` where ``path`` is a folder or cannot be written.
        """
        units = [(section.plan, section.groups) for section in self.sections]
        write_whole(Path(path), web.page(self.to_dict(), units))


def _summary(
    sections: Sequence[Section], options: Options, linears: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    quantised = [entry for entry in linears if entry["route"] != "keep"]
    judged = [entry for entry in quantised if None not in _before_after(entry)]
    return {
        "phase": _phase(sections),
        "recipe": options.recipe,
        "format": options.format,
        "scheme": " + ".join(_distinct(s.scheme for s in sections)) or options.scheme,
        "calibration_calls": max((section.calibration_calls for section in sections), default=0),
        "linears_total": len(linears),
        "linears_quantised": len(quantised),
        "linears_reordered": sum(entry["accepted"] for entry in linears),
        "free_flop_share": _free_flop_share(sections),
        "error_before": _mean_by_flops(judged, "error_before"),
        "error_after": _mean_by_flops(judged, "error_after"),
        "weight_bytes_before": sum(section.weight_bytes_before for section in sections),
        "weight_bytes_after": sum(section.weight_bytes_after for section in sections),
        "warnings": _distinct(warning for section in sections for warning in section.warnings),
    }


def _phase(sections: Sequence[Section]) -> str:
    if not sections:
        return "nothing compiled yet"
    return "; ".join(_distinct(section.phase for section in sections))


def _free_flop_share(sections: Sequence[Section]) -> float:
    """FLOPs of linears that read a free axis over all FLOPs, within the repeated blocks."""
    every = [planned for section in sections for planned in section.plan.linears]
    counted = [planned for planned in every if planned.linear.in_block] or every
    total = sum(planned.linear.flops for planned in counted)
    free = sum(planned.linear.flops for planned in counted if planned.free)
    return free / total if total else 0.0


def _mean_by_flops(linears: Sequence[Mapping[str, Any]], key: str) -> float | None:
    total = sum(entry["flops"] for entry in linears)
    if not total:
        return None
    return _finite(math.fsum(entry[key] * entry["flops"] for entry in linears) / total)


def _before_after(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return entry["error_before"], entry["error_after"]


def _linears(section: Section) -> list[dict[str, Any]]:
    return [_linear(planned, section) for planned in section.plan.linears]


def _linear(planned: LinearPlan, section: Section) -> dict[str, Any]:
    linear = planned.linear
    return {
        "name": linear.name,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "flops": linear.flops,
        "group": planned.group,
        "free": planned.free,
        "accepted": planned.accepted,
        "error_before": _finite(planned.error_before),
        "error_after": _finite(planned.error_after),
        "route": planned.route,
        "kernel": section.kernels.get(linear.name),
        "bits_per_weight": planned.bits_per_weight,
        "reason": planned.reason,
    }


def _groups(section: Section) -> list[dict[str, Any]]:
    verdicts = {verdict.group: verdict for verdict in section.plan.verdicts}
    readers = {planned.linear.input_axis: planned.linear.name for planned in section.plan.linears}
    return [
        _group(group, verdicts.get(group.name), section)
        | {"feeds": [readers[axis] for axis in group.axes if axis in readers]}
        for group in section.groups.groups
    ]


def _group(group: Group, verdict: Verdict | None, section: Section) -> dict[str, Any]:
    return {
        "name": group.name,
        "axes": [str(axis) for axis in group.axes],
        "structure": group.structure,
        "free": group.free,
        "pinned_by": list(group.pinned_by),
        "accepted": verdict is not None and verdict.accepted,
        "reason": _reason(group, verdict, section),
        "error_before": _finite(verdict.error_before) if verdict else None,
        "error_after": _finite(verdict.error_after) if verdict else None,
        "alpha": verdict.alpha if verdict else None,
    }


def _reason(group: Group, verdict: Verdict | None, section: Section) -> str:
    if group.pinned_by:
        return f"pinned by {'; '.join(group.pinned_by)}"
    if verdict is not None:
        return verdict.reason
    if section.plan.recipe == "rtn":
        return "recipe rtn keeps every order"
    return f"no order has been judged ({section.phase})"


def _added(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0) + value
    return total


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: an error that is one was not measured."""
    return value if value is not None and math.isfinite(value) else None
