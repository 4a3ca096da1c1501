"""Figures as inline SVG: error bars, permutations, and which axes of a block move together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from .permutation import Permutation
from .plan import Axis, Group, Groups, Plan
from .show import error
from .table import split

DOTS = 400  # channels drawn of one permutation
NODES = 48  # rows drawn of one block
RAILS = 16  # groups drawn of one block
LABEL = 40  # characters of a row's label
ROW, GAP, CHARACTER, RAIL = 17, 9, 7.25, 34  # pixels
ROLES = {"in": "reads", "out": "writes", "along": "moves along"}


def bars(before: float | None, after: float | None, top: float) -> str:
    """Two bars on one scale: outlined before, filled after; empty where nothing was measured."""
    if before is None or after is None or not top:
        return ""
    label = f"error {error(before)} before, {error(after)} after"
    widths = [f"{150 * min(value / top, 1):.1f}" for value in (before, after)]
    return (
        f'<svg class="bars" viewBox="0 0 152 15" role="img" aria-label="{label}">'
        f'<rect class="before" x="1" y="1.5" width="{widths[0]}" height="4.5"/>'
        f'<rect class="after" x="1" y="8.5" width="{widths[1]}" height="5"/></svg>'
    )


def permutation(order: Permutation) -> str:
    """A dot per channel: across, where it is now; down, where it was. Unmoved is the diagonal."""
    size = len(order)
    step = max(1, -(-size // DOTS))
    scale = 300 / max(1, size - 1)
    dots = "".join(
        f"M{position * scale:.0f} {order.order[position] * scale:.0f}h0"
        for position in range(0, size, step)
    )
    note = "" if step == 1 else f", every {step}th drawn"
    return (
        f'<svg class="order" viewBox="-8 -8 316 316" role="img" '
        f'aria-label="{size} channels, new place across, old place down{note}">'
        f'<rect class="frame" x="-6" y="-6" width="312" height="312"/>'
        f'<path class="diagonal" d="M0 0L300 300"/><path class="dots" d="{dots}"/></svg>'
    )


class Port(NamedTuple):
    """Where a group meets a module: the module reads, writes or moves along with its order."""

    role: str
    group: str


@dataclass(frozen=True)
class Block:
    """The modules of one block in the order they are first used, and the groups they touch."""

    name: str
    modules: Mapping[str, tuple[Port, ...]]
    linears: frozenset[str]
    groups: tuple[Group, ...]
    accepted: frozenset[str]
    left_out: tuple[int, int]  # modules and groups that are not drawn


def block(plan: Plan, groups: Groups) -> Block:
    """The first block of the first repeated kind; the whole model where no block repeats.

    Where groups are too many to read, free ones go before pinned ones, far-reaching ones first.
    """
    prefix = _first_block([planned.linear.name for planned in plan.linears])
    owners: dict[Axis, list[Group]] = {}
    for group in groups.groups:
        for axis in group.axes:
            owners.setdefault(axis, []).append(group)
    flat = {axis.parameter for axis in groups.segments}
    flat -= {axis.parameter for axis in groups.segments if axis.dim}
    linears = frozenset(planned.linear.name for planned in plan.linears)
    modules: dict[str, dict[Port, None]] = {}
    for axis in sorted(groups.segments, key=_in_order(groups.segments)):
        module = axis.parameter.rpartition(".")[0]
        if not axis.parameter.startswith(prefix):
            continue
        name = module if module.startswith(prefix) and module else axis.parameter
        along = axis.parameter in flat and name not in linears
        role = "along" if along else "in" if axis.dim else "out"
        ports = modules.setdefault(name, {})
        ports.update({Port(role, group.name): None for group in owners.get(axis, ())})
    shown = {name: tuple(modules[name]) for name in list(modules)[:NODES] if modules[name]}
    meets = Counter(port.group for ports in shown.values() for port in ports)
    touched = [group for group in groups.groups if group.name in meets]
    telling = sorted(touched, key=lambda group: (not group.free, -meets[group.name]))[:RAILS]
    return Block(
        name=prefix.removesuffix("."),
        modules=shown,
        linears=linears,
        groups=tuple(group for group in touched if group in telling),
        accepted=frozenset(v.group for v in plan.verdicts if v.accepted),
        left_out=(max(0, len(modules) - NODES), max(0, len(touched) - RAILS)),
    )


def _first_block(names: Iterable[str]) -> str:
    """The first index of the first kind of block that has several: "transformer_blocks.0."."""
    seen: dict[str, list[int]] = {}
    for name in names:
        prefix, index, rest = split(name)
        if index is not None and rest and index not in seen.setdefault(prefix, []):
            seen[prefix].append(index)
    repeated = [prefix for prefix, indices in seen.items() if len(indices) > 1]
    return f"{repeated[0]}{seen[repeated[0]][0]}." if repeated else ""


def _in_order(axes: Iterable[Axis]) -> _Order:
    first: dict[str, int] = {}
    for axis in axes:
        first.setdefault(axis.parameter, len(first))
    return _Order(first)


@dataclass(frozen=True)
class _Order:
    """Sort key: parameters as first used, of one parameter the input axis before the output."""

    first: Mapping[str, int]

    def __call__(self, axis: Axis) -> tuple[int, int]:
        return self.first[axis.parameter], -axis.dim


def rails(drawn: Block) -> str:
    """Modules as boxes, top to bottom; groups as rails beside them, one letter each.

    An arrow into a box reads the group's order, an arrow onto a rail writes it, a plain dot moves
    along. Rails that do not overlap share a column.
    """
    letter = {group.name: i for i, group in enumerate(drawn.groups)}
    tops, heights = _rows(drawn, letter)
    spans = _spans(drawn, letter, tops)
    columns = _columns([spans[group.name] for group in drawn.groups])
    labels = {name: _label(name, drawn.name) for name in drawn.modules}
    wide = max((len(label) for label in labels.values()), default=0) * CHARACTER + 22
    x = [wide + 48 + RAIL * column for column in columns]
    size = (max(x, default=wide) + 30, sum(heights.values()) + GAP * len(heights) + 34)
    parts = [
        f'<svg class="block" width="{size[0]:.0f}" height="{size[1]:.0f}" '
        f'viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" role="img" '
        f'aria-label="axis groups of {escape(drawn.name or "the model")}">'
    ]
    for group, at in zip(drawn.groups, x, strict=True):
        top, bottom = spans[group.name]
        parts.append(
            f'<g class="{_classes(group, letter, drawn)}"><path class="rail" '
            f'd="M{at:.0f} {top - 4:.0f}V{bottom + 4:.0f}"/></g>'
        )
    for name, ports in drawn.modules.items():
        parts.append(_box(name, labels[name], tops[name], heights[name], wide, drawn))
        kept = [port for port in ports if port.group in letter]
        for i, port in enumerate(kept):
            group = drawn.groups[letter[port.group]]
            y = tops[name] + ROW * i + 14
            connector = _connector(port.role, wide + 1, x[letter[port.group]], y)
            parts.append(f'<g class="{_classes(group, letter, drawn)}">{connector}</g>')
    for group, at in zip(drawn.groups, x, strict=True):
        badge = _badge(at, spans[group.name][0] - 12, letter_of(letter[group.name]))
        parts.append(f'<g class="{_classes(group, letter, drawn)}">{badge}</g>')
    return "".join([*parts, "</svg>"])


def letter_of(index: int) -> str:
    """A, B, C: the name of a rail in the figure and its legend."""
    return chr(ord("A") + index)


def _rows(drawn: Block, letter: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    tops: dict[str, float] = {}
    heights: dict[str, float] = {}
    y = 24.0
    for name, ports in drawn.modules.items():
        kept = sum(port.group in letter for port in ports)
        tops[name], heights[name] = y, ROW * max(1, kept) + 10
        y += heights[name] + GAP
    return tops, heights


def _spans(
    drawn: Block, letter: Mapping[str, int], tops: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    meets: dict[str, list[float]] = {name: [] for name in letter}
    for name, ports in drawn.modules.items():
        kept = [port for port in ports if port.group in letter]
        for i, port in enumerate(kept):
            meets[port.group].append(tops[name] + ROW * i + 14)
    return {name: (min(ys), max(ys)) for name, ys in meets.items()}


def _columns(spans: Sequence[tuple[float, float]]) -> list[int]:
    """The leftmost free column for each rail, short rails first; room for the badge above."""
    taken: list[list[tuple[float, float]]] = []
    columns = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], i)):
        top, bottom = spans[i][0] - 26, spans[i][1] + 8
        free = (c for c, runs in enumerate(taken) if all(bottom < t or b < top for t, b in runs))
        columns[i] = next(free, len(taken))
        if columns[i] == len(taken):
            taken.append([])
        taken[columns[i]].append((top, bottom))
    return columns


def _label(name: str, prefix: str) -> str:
    short = name.removeprefix(f"{prefix}.") if prefix else name
    return short if len(short) <= LABEL else f"{short[:19]}…{short[-20:]}"


def _classes(group: Group, letter: Mapping[str, int], drawn: Block) -> str:
    state = "accepted" if group.name in drawn.accepted else "free" if group.free else "pinned"
    return f"hue{letter[group.name] % 8} {state}"


def _box(name: str, label: str, top: float, height: float, wide: float, drawn: Block) -> str:
    kind = "linear" if name in drawn.linears else "other"
    return (
        f'<g class="module {kind}"><title>{escape(name)}</title>'
        f'<rect x="1" y="{top:.0f}" width="{wide:.0f}" height="{height:.0f}" rx="5"/>'
        f'<text x="11" y="{top + height / 2 + 4:.0f}">{escape(label)}</text></g>'
    )


def _connector(role: str, left: float, right: float, y: float) -> str:
    line = f'<path class="wire" d="M{left:.0f} {y:.0f}H{right:.0f}"/>'
    if role == "in":
        head = f"M{left:.0f} {y:.0f}l9 -4v8z"
    elif role == "out":
        head = f"M{right:.0f} {y:.0f}l-9 -4v8z"
    else:
        head = ""
    dot = "" if role == "out" else f'<circle cx="{right:.0f}" cy="{y:.0f}" r="3"/>'
    return f'<g><title>{ROLES[role]}</title>{line}<path class="head" d="{head}"/>{dot}</g>'


def _badge(x: float, y: float, text: str) -> str:
    return (
        f'<circle class="badge" cx="{x:.0f}" cy="{y:.0f}" r="8"/>'
        f'<text class="letter" x="{x:.0f}" y="{y + 4:.0f}">{text}</text>'
    )
