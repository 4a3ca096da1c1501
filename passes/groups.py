"""Values of ``plan.Groups``: gathered from rows of leaves, merged, renamed, and given orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import torch

from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Orders, Segment

from .axes import Leaf, Row, resolve, tie

SINGLE = "a size of one channel"


def gather(rows: Mapping[Axis, Row]) -> Groups:
    """Number the leaves in order of appearance and bundle those that occur on the same axes.

    Neighbouring leaves that are pinned for the same reasons count as one leaf: nothing moves there.
    """
    leaves: dict[Row, int] = {}
    segments: dict[Axis, tuple[Segment, ...]] = {}
    for axis, row in rows.items():
        runs = _runs(resolve(row))
        segments[axis] = tuple(
            Segment(leaves.setdefault(run, len(leaves)), sum(leaf.size for leaf in run))
            for run in runs
        )
    return _bundle(segments, {number: _reasons(run[0]) for run, number in leaves.items()})


def _runs(row: Row) -> list[Row]:
    """Each free leaf by itself, neighbours pinned for the same reasons together."""
    runs: list[Row] = []
    for reasons, some in groupby(row, key=_reasons):
        leaves = tuple(some)
        runs += [leaves] if reasons else [(leaf,) for leaf in leaves]
    return runs


def _reasons(leaf: Leaf) -> tuple[str, ...]:
    return leaf.reasons or ((SINGLE,) if leaf.size < 2 else ())


def _bundle(
    segments: Mapping[Axis, tuple[Segment, ...]], reasons: Mapping[int, tuple[str, ...]]
) -> Groups:
    axes: dict[Segment, dict[Axis, None]] = {}
    for axis, row in segments.items():
        for segment in row:
            axes.setdefault(segment, {})[axis] = None
    bundles: dict[tuple[tuple[Axis, ...], int, tuple[str, ...]], list[int]] = {}
    for segment, members in axes.items():
        key = (tuple(members), segment.size, reasons[segment.leaf])
        bundles.setdefault(key, []).append(segment.leaf)
    names = _names([members[0] for members, _, _ in bundles])
    groups = (
        Group(name, tuple(leaves), size, members, why)
        for name, ((members, size, why), leaves) in zip(names, bundles.items(), strict=True)
    )
    return Groups(segments, tuple(groups))


def _names(axes: Sequence[Axis]) -> list[str]:
    """A group is named by its first axis; ``#1``, ``#2`` tell those apart that share it."""
    shared, seen = Counter(axes), Counter[Axis]()
    names = []
    for axis in axes:
        seen[axis] += 1
        names.append(f"{axis}#{seen[axis]}" if shared[axis] > 1 else f"{axis}")
    return names


def merge(many: Sequence[Groups]) -> Groups:
    """What holds in every graph: axes of one parameter are tied, and pins add up.

    Raises ``ValueError`` if an axis has different sizes in two graphs.
    """
    rows: dict[Axis, Row] = {}
    for groups in many:
        reasons = {leaf: group.pinned_by for group in groups.groups for leaf in group.leaves}
        leaves: dict[Segment, Leaf] = {}
        for axis, segments in groups.segments.items():
            row = tuple(
                leaves.setdefault(
                    segment, Leaf(segment.size, str(axis), reasons=reasons[segment.leaf])
                )
                for segment in segments
            )
            known = rows.setdefault(axis, row)
            if sum(leaf.size for leaf in known) != sum(leaf.size for leaf in row):
                raise ValueError(f"{axis} has different sizes in two graphs")
            tie(known, row, f"{axis} in another graph")
    return gather(rows)


def rename(groups: Groups, names: Mapping[str, str]) -> Groups:
    """The same under other parameter names; a name that is absent stays."""

    def renamed(axis: Axis) -> Axis:
        return Axis(names.get(axis.parameter, axis.parameter), axis.dim)

    reasons = {leaf: group.pinned_by for group in groups.groups for leaf in group.leaves}
    return _bundle({renamed(axis): row for axis, row in groups.segments.items()}, reasons)


def random_orders(groups: Groups, seed: int) -> Orders:
    """A random permutation for every free leaf."""
    generator = torch.Generator().manual_seed(seed)
    return {
        leaf: Permutation.random(group.size, generator)
        for group in groups.groups
        if group.free
        for leaf in group.leaves
    }


def extend(orders: Mapping[Axis, Permutation], groups: Groups) -> tuple[Orders, tuple[str, ...]]:
    """Orders of whole axes, already in force, as orders of the leaves of ``groups``.

    A leaf keeps its channels in place where its known axes disagree, where an order moves channels
    across its borders, or where it is pinned; then a sentence says so, naming the axis. An axis
    whose order is not known follows its leaves.
    """
    known: dict[int, tuple[Axis, Permutation]] = {}
    refused: dict[int, str] = {}
    pins = {leaf: group.pinned_by for group in groups.groups for leaf in group.leaves}
    for axis, order in orders.items():
        for segment, part in _parts(order, groups.segments.get(axis, ())):
            refusal = _refusal(axis, segment, part, pins, known)
            if refusal:
                refused.setdefault(segment.leaf, refusal)
            elif part is not None:
                known.setdefault(segment.leaf, (axis, part))
    found = {
        leaf: part
        for leaf, (_, part) in known.items()
        if leaf not in refused and not part.is_identity
    }
    return found, tuple(refused.values())


def _parts(
    order: Permutation, segments: Iterable[Segment]
) -> Iterable[tuple[Segment, Permutation | None]]:
    """The order of each segment by itself; None where channels cross its borders."""
    start = 0
    for segment in segments:
        channels = [channel - start for channel in order.order[start : start + segment.size]]
        within = all(0 <= channel < segment.size for channel in channels)
        yield segment, Permutation.of(channels) if within else None
        start += segment.size


def _refusal(
    axis: Axis,
    segment: Segment,
    part: Permutation | None,
    pins: Mapping[int, tuple[str, ...]],
    known: Mapping[int, tuple[Axis, Permutation]],
) -> str | None:
    """Why the order of this part of the axis cannot be kept; None if it can."""
    if part is None:
        return f"{axis} is ordered across the border of its segment of {segment.size} channels"
    if pins[segment.leaf] and not part.is_identity:
        return f"{axis} is reordered, but pinned by {'; '.join(pins[segment.leaf])}"
    other, agreed = known.get(segment.leaf, (axis, part))
    if agreed != part:
        return f"{axis} and {other} must be ordered alike, but are not"
    return None
