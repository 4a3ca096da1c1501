"""The figures of a run as Markdown tables, for a terminal and for pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .kinds import KINDS

Record = Mapping[str, Any]
BASE = "bf16 torch.compile"


def text(record: Record) -> str:
    """All tables that the parts of ``record`` give, with a line above each."""
    parts = record["parts"]
    found: list[str] = []
    if "flux" in parts:
        found += [steps(parts["flux"]), kinds(parts["flux"]), memory(parts["flux"])]
    if "overhead" in parts:
        found.append(hosts([parts["overhead"]]))
    found += [steps(one) for one in parts.get("models", ())]
    if "scaling" in parts:
        found.append(scaling(parts["scaling"]))
    if "gemm" in parts:
        found.append(gemm(parts["gemm"]))
    if "modulation" in parts:
        found.append(modulation(parts["modulation"]))
    if "bandwidth" in parts:
        found.append(bandwidth(parts["bandwidth"]))
    found += [f"{name}: skipped, for {why}" for name, why in record["skipped"].items()]
    found += [f"{name}: failed" for name in record["failed"]]
    return "\n\n".join(found)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A number to three digits or so; a dash for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 200 else f"{value:.3g}"
    return str(value)


BLOCKS = (("num_layers", "blocks"), ("num_single_layers", "single blocks"), ("n_layers", "blocks"))


def model(group: Record) -> str:
    """A model and how many blocks it has here."""
    config = group["config"]
    counts = [f"{config[name]} {word}" for name, word in BLOCKS if name in config]
    return f"{group['model']} ({', '.join(counts)})"


def title(group: Record) -> str:
    """Which model and which step."""
    return f"{model(group)}, {group['resolution']} px, batch {group['batch']}"


def base(group: Record, key: str = "wall_ms") -> float | None:
    """The median step of torch.compile in bf16, the fastest of its modes."""
    known = [s[key]["median"] for s in group["sides"] if s["kind"] == "inductor" and key in s]
    return min(known, default=None)


def steps(group: Record) -> str:
    """Step times and the ratio to torch.compile in bf16."""
    against = base(group)
    rows = []
    for side in group["sides"]:
        if "wall_ms" not in side:
            continue
        wall = side["wall_ms"]
        rows.append(
            (
                side["side"],
                wall["median"],
                f"{wall['low']:.4g}-{wall['high']:.4g}",
                side.get("kernel_ms"),
                against / wall["median"] if against else None,
                side.get("host_ms"),
                side.get("outside_us"),
                side["output"].get("distance"),
            )
        )
    head = ("side", "step ms", "range", "kernels ms", "times faster than compiled bf16")
    more = ("host ms", "us outside", "distance from bf16")
    return f"{title(group)}\n\n{table((*head, *more), rows)}"


def kinds(group: Record) -> str:
    """Milliseconds of kernels by kind."""
    sides = [side for side in group["sides"] if "split_ms" in side]
    rows = [(s["side"], *(float(s["split_ms"][kind]) for kind in KINDS)) for s in sides]
    return f"Kernels by kind, ms a step\n\n{table(('side', *KINDS), rows)}"


def memory(group: Record) -> str:
    """Gigabytes that stay and at the peak; seconds to freeze and to compile."""
    rows = []
    for side in group["sides"]:
        held, freezing = side["memory"], side.get("freezing", {})
        steps = freezing.get("steps_s", {})
        rows.append(
            (
                side["side"],
                held["parameter_bytes"] / 1e9,
                held["allocated_bytes"] / 1e9,
                held["peak_step_bytes"] / 1e9,
                freezing["peak_bytes"] / 1e9 if freezing else None,
                float(sum(steps.values())) if steps else None,
                side.get("compile", {}).get("first_call_s"),
            )
        )
    head = ("side", "parameters GB", "allocated GB", "peak of a step GB", "peak freezing GB")
    return f"Memory and time to start\n\n{table((*head, 'freezing s', 'compiling s'), rows)}"


def hosts(groups: Iterable[Record]) -> str:
    """The host's share of a call."""
    rows = [
        (f"{group['model']}, {side['side']}", side["host_ms"], side.get("outside_us"))
        for group in groups
        for side in group["sides"]
    ]
    return f"The host's time per call\n\n{table(('side', 'ms', 'us outside compiled code'), rows)}"


def scaling(part: Record) -> str:
    """Step times by size, and how much faster the last side is than the first."""
    sides = part["sides"]
    rows = []
    for i, work in enumerate(sides[0]["works"]):
        took = [s["works"][i].get("wall_ms", {}).get("median") for s in sides if s["works"][i:]]
        ratios = [took[0] / one if took[0] and one else None for one in took[1:]]
        rows.append((f"{work['resolution']} px, batch {work['batch']}", *took, *ratios))
    names = [side["side"] for side in sides]
    head = ("step", *(f"{n} ms" for n in names), *(f"{n} times faster" for n in names[1:]))
    return f"Sizes\n\n{table(head, rows)}"


def gemm(part: Sequence[Record]) -> str:
    """TFLOP/s by shape and route."""
    routes = list(dict.fromkeys(name for row in part for name in row["tflops"]))
    rows = [
        (" x ".join(map(str, row["shape"])), *(row["tflops"].get(name) for name in routes))
        for row in part
    ]
    return f"Products, TFLOP/s\n\n{table(('M x N x K', *routes), rows)}"


def modulation(part: Sequence[Record]) -> str:
    """Microseconds of products with a few rows."""
    names = list(part[0]["us"])
    rows = [
        (
            " x ".join(map(str, row["shape"])),
            *(row["us"][name] for name in names),
            *(row["gb_per_s"][name] for name in names),
            row["ratio"],
        )
        for row in part
    ]
    head = (*(f"{n} us" for n in names), *(f"{n} GB/s" for n in names), "times faster")
    return f"Modulation\n\n{table(('M x N x K', *head), rows)}"


def bandwidth(part: Record) -> str:
    """Microseconds and bandwidth of the kernels bound by memory."""
    rows = [
        (
            f"{row['kernel']}, {' x '.join(map(str, row['shape']))}",
            row["us"],
            row["gb_per_s"],
            f"{row['share_of_copy']:.0%}",
            f"{row['share_of_equal_copy']:.0%}",
        )
        for row in part["kernels"]
    ]
    head = ("kernel", "us", "GB/s", "of a large copy", "of a copy of as many bytes")
    copy = f"A copy of {part['copy_bytes'] / 1e9:.1f} GB runs at {part['copy_gb_per_s']:.0f} GB/s"
    return f"{copy}\n\n{table(head, rows)}"
