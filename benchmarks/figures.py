"""The figures of the documentation, drawn from committed results.

    python -m benchmarks.figures benchmarks/*.json [--out docs/figures]

A part that several files hold is drawn from the last of them; steps of FLUX.1-dev from every file
with as many blocks as any. The tables behind the figures are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import charts, kinds, results, roofline, tables, work
from .charts import Group, Row

Record = dict[str, Any]
Figure = Callable[[Sequence[Record]], str | None]


def where(record: Record) -> str:
    """Device and versions."""
    versions = record["versions"]
    return f"{record['device']['name']}, torch {versions['torch']}, triton {versions['triton']}"


def _last(records: Sequence[Record], part: str) -> Record | None:
    return next((one for one in reversed(records) if part in one["parts"]), None)


def _full(records: Sequence[Record], key: str) -> list[Record]:
    """Those that measured FLUX with the most blocks, and recorded ``key`` of a side."""
    known = [r for r in records if any(key in s for s in _flux(r).get("sides", ()))]
    most = max((_blocks(_flux(record)) for record in known), default=0)
    return [record for record in known if _blocks(_flux(record)) == most]


def _flux(record: Record) -> Record:
    found: Record = record["parts"].get("flux", {})
    return found


def _blocks(group: Record) -> int:
    shape = roofline.shape_of(group)
    return shape.double + shape.single


def step(records: Sequence[Record]) -> str | None:
    """Kernel time of a step by kind; the wall clock and the ratio behind each bar."""
    chosen = _full(records, "split_ms")
    rows: list[Row] = []
    for record in chosen:
        group = _flux(record)
        against = tables.base(group)
        if len(chosen) > 1:
            rows.append(Row(f"One process: {where(record)}"))
        for side in group["sides"]:
            if "split_ms" not in side:
                continue
            wall = side["wall_ms"]["median"]
            note = f"{wall:.1f} ms" + (f", {against / wall:.2f}x" if against else "")
            rows.append(Row(side["side"], side["split_ms"], note))
    if not rows:
        return None
    subtitle = (
        f"{tables.title(_flux(chosen[-1]))}. Bars: milliseconds of kernels by kind; numbers: wall "
        f"clock of a step, and how many times faster than bf16 torch.compile. {where(chosen[-1])}"
    )
    return charts.stacked("Time of one denoiser step", subtitle, rows, kinds.KINDS)


def memory(records: Sequence[Record]) -> str | None:
    """Parameters, peak of a step, peak of freezing."""
    chosen = _full(records, "memory")
    groups: dict[str, Group] = {}
    for record in chosen:
        for side in _flux(record)["sides"]:
            held = side["memory"]
            bars: dict[str, float | None] = {
                "parameters": held["parameter_bytes"] / 1e9,
                "peak of a step": held["peak_step_bytes"] / 1e9,
            }
            if "freezing" in side:
                bars["peak while freezing"] = side["freezing"]["peak_bytes"] / 1e9
            groups.setdefault(side["side"], Group(side["side"], bars))
    if not groups:
        return None
    subtitle = f"{tables.title(_flux(chosen[-1]))}. {where(chosen[-1])}"
    return charts.grouped("GPU memory", subtitle, list(groups.values()), "GB")


def scaling(records: Sequence[Record]) -> str | None:
    """Step time over resolutions and batches."""
    record = _last(records, "scaling")
    if record is None:
        return None
    sides = record["parts"]["scaling"]["sides"]
    groups = []
    for i, of in enumerate(sides[0]["works"]):
        took = {
            side["side"]: side["works"][i].get("wall_ms", {}).get("median")
            for side in sides
            if side["works"][i:]
        }
        groups.append(Group(f"{of['resolution']} px, batch {of['batch']}", took))
    model = tables.model(record["parts"]["scaling"])
    subtitle = f"{model}, one step, wall clock. {where(record)}"
    return charts.grouped("Resolutions and batches", subtitle, groups, "ms")


def gemm(records: Sequence[Record]) -> str | None:
    """TFLOP/s by shape and route."""
    record = _last(records, "gemm")
    if record is None:
        return None
    part = record["parts"]["gemm"]
    groups = [Group(" x ".join(map(str, row["shape"])), row["tflops"]) for row in part]
    subtitle = (
        "M x N x K of the block linears of FLUX.1-dev; decoding a weight is counted, quantising an "
        f"activation is not. {where(record)}"
    )
    return charts.grouped("Products by route", subtitle, groups, "TFLOP/s")


def bandwidth(records: Sequence[Record]) -> str | None:
    """Kernels bound by memory, as shares of a copy."""
    record = _last(records, "bandwidth")
    if record is None:
        return None
    part = record["parts"]["bandwidth"]
    groups = [
        Group(
            f"{row['kernel']}, {' x '.join(map(str, row['shape']))}",
            {"share": 100 * row["share_of_copy"]},
        )
        for row in part["kernels"]
    ]
    subtitle = (
        "Each input counted as read once and each output as written once, buffers beyond the L2 "
        f"cache; 100 % is a copy of {part['copy_bytes'] / 1e9:.1f} GB in the same run, "
        f"{part['copy_gb_per_s']:.0f} GB/s. {where(record)}"
    )
    return charts.grouped("Bandwidth", subtitle, groups, "%", (100.0, "copy"))


def models(records: Sequence[Record]) -> str | None:
    """Step times of the other models."""
    record = _last(records, "models")
    if record is None:
        return None
    found = record["parts"]["models"]
    groups = [
        Group(
            tables.model(group),
            {s["side"]: s["wall_ms"]["median"] for s in group["sides"] if "wall_ms" in s},
        )
        for group in found
    ]
    size = found[-1]
    subtitle = f"One step at {size['resolution']} px, batch {size['batch']}, wall clock. "
    subtitle += where(record)
    return charts.grouped("Other models", subtitle, groups, "ms")


def projection(records: Sequence[Record]) -> str:
    """The step on devices at hand and not, on paper."""
    shares: dict[str, float] = {}
    for record in records:
        shares = roofline.measured_shares(record) or shares
    rows: list[Row] = []
    for one in roofline.project(work.Shape(), shares):
        label = f"{one['device']}, {one['scheme']}"
        note = f"{one['step_ms']:.0f} ms, {one['ratio']:.2f}x ({roofline.LABEL})"
        rows.append(Row(label, one["split_ms"], note))
    measured = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    share = f"measured: {measured}" if measured else f"assumed: {roofline.ASSUMED_SHARE:.0%}"
    subtitle = (
        f"A {roofline.LABEL} from stated peak rates, not a measurement: FLUX.1-dev, 1024 px, one "
        f"step. Elementwise kernels at a share of the memory's bandwidth that is {share}."
    )
    title = f"Step time on paper: a {roofline.LABEL}"
    return charts.stacked(title, subtitle, rows, kinds.KINDS)


FIGURES: dict[str, Figure] = {
    "step": step,
    "memory": memory,
    "scaling": scaling,
    "gemm": gemm,
    "bandwidth": bandwidth,
    "models": models,
    "projection": projection,
}


def draw(records: Sequence[Record]) -> dict[str, str]:
    """Name -> SVG of every figure that ``records`` give."""
    drawn = {name: figure(records) for name, figure in FIGURES.items()}
    return {name: svg for name, svg in drawn.items() if svg is not None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures and print the tables; files of other programs are left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    given = parser.parse_args(arguments)
    records = [record for path in given.results if (record := results.read(path)) is not None]
    given.out.mkdir(parents=True, exist_ok=True)
    for name, svg in draw(records).items():
        (given.out / f"{name}.svg").write_text(svg, encoding="utf-8")
    for record in records:
        print(f"{where(record)}\n\n{tables.text(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
