"""What a compilation leaves in the dump folder: graphs as they come, units as they freeze."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from .dump import Dump, constraints
from .plan import Groups, Orders, Plan, Statistics, axis_order
from .show import order_line, show

_COUNTERS: dict[tuple[Path, str], count[int]] = {}


def numbered(folder: Path | None, kind: str) -> Dump:
    """The dump of the next ``kind`` ("graph", "unit") in this folder; the first has no prefix."""
    if folder is None:
        return Dump(None)
    number = next(_COUNTERS.setdefault((folder, kind), count()))
    return Dump(folder, prefix=f"{kind}{number}_" if number else "")


def dump_frozen(
    dump: Dump,
    statistics: Mapping[str, Statistics],
    groups: Groups,
    plan: Plan,
    served: Mapping[str, tuple[Tensor, ...]],
) -> None:
    """Statistics, plan, and what was folded and packed, with checksums of the bytes."""
    if dump.folder is None:
        return
    dump.write("01_constraints.dot", constraints(groups))
    dump.write("02_statistics", show(statistics))
    dump.write("03_plan", show(plan))
    dump.write("04_folded", "\n".join(_folded(groups, plan.orders, served)) + "\n")


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
