"""What a compilation leaves in the dump folder: graphs as they come, units as they freeze."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dump import Dump, constraints
from .kernels import KernelSpec, source
from .ops import specs
from .plan import Groups, LinearPlan, Orders, Statistics, axis_order
from .reporting import Report
from .sections import section
from .show import order_line, show
from .unit import Unit

_COUNTERS: dict[tuple[Path, str], count[int]] = {}


def numbered(folder: Path | None, kind: str) -> Dump:
    """The dump of the next ``kind`` ("graph", "unit") in this folder; the first has no prefix."""
    if folder is None:
        return Dump(None)
    number = next(_COUNTERS.setdefault((folder, kind), count()))
    return Dump(folder, prefix=f"{kind}{number}_" if number else "")


def dump_frozen(unit: Unit, statistics: Mapping[str, Statistics]) -> None:
    """Statistics, plan, what was folded and packed with checksums, kernels and the report."""
    dump = numbered(unit.options.dump, "unit")
    if dump.folder is None or unit.plan is None:
        return
    groups = unit.needs.groups
    dump.write("01_constraints.dot", constraints(groups))
    dump.write("02_statistics", show(statistics))
    dump.write("03_plan", show(unit.plan))
    dump.write("04_folded", "\n".join(_folded(groups, unit.plan.orders, unit.served())) + "\n")
    tensors = unit.parameters()
    for planned in unit.plan.linears:
        for spec in _specs(planned, tensors.get(planned.linear.weight), unit.options.format):
            dump.kernel(str(spec), source(spec))
    report = Report((section(unit, {}),), unit.options)
    report.to_html(dump.folder / f"{dump.prefix}report.html")


def _specs(planned: LinearPlan, weight: Tensor | None, format: str) -> Sequence[KernelSpec]:
    """The kernels that this linear runs on its device."""
    one = planned.linear
    if planned.route == "keep" or weight is None:
        return ()
    shape: dict[str, Any] = {
        "k": one.in_features,
        "n": one.out_features,
        "bias": one.bias is not None,
    }
    how = (format, planned.route, one.rows)
    return specs(weight.device, *how, dtype=weight.dtype, **shape)


def _folded(groups: Groups, orders: Orders, served: Mapping[str, tuple[Tensor, ...]]) -> list[str]:
    lines = []
    for axis in sorted(groups.segments):
        order = axis_order(axis, groups, orders)
        if not order.is_identity:
            lines.append(f"{axis}: {order_line(order)}")
    for name in sorted(served):
        sums = " ".join(f"{_checksum(tensor):08x}" for tensor in served[name])
        lines.append(f"{name}: served as {len(served[name])} tensors, crc32 {sums}")
    return lines


def _checksum(tensor: Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.cpu().numpy().tobytes())
