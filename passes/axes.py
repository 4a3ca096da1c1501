"""How the channels along one dim of a value are ordered, and what ties two such orders together.

A dim of a value is one of three things:

* ``Channels``: a row of leaves. Each leaf stands for one unknown permutation of its channels;
  leaves are merged when an op ties two rows and split when an op cuts a row between two channels.
  A dim may hold a table of rows indexed by other dims of the same value: one row per head, say.
* ``Fixed``: the positions carry meaning, nothing moves; with the reasons.
* ``None``: the value is the same all along the dim (its size is 1, or it was expanded): any order
  does.

Invariant: a dim that another dim's table is indexed by is ``Fixed``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

import sympy

REASONS = 4  # distinct reasons kept per leaf
PARTS = 4096  # rows of a table, or repetitions in a row, beyond which a dim is pinned

Size: TypeAlias = "int | sympy.Expr"
Sizes: TypeAlias = Sequence[Size] | Mapping[int, Size]  # of the dims that tables are indexed by
Place: TypeAlias = Mapping[int, int]  # dim -> position along it


@dataclass(eq=False, slots=True)
class Leaf:
    """One permutation of ``size`` channels, unknown yet: a node of a union-find that can split."""

    size: int
    name: str = ""
    reasons: tuple[str, ...] = ()
    link: Leaf | None = None
    parts: tuple[Leaf, Leaf] | None = None
    causes: tuple[str, ...] = ()  # the reasons that pinned this very leaf
    ties: list[tuple[Leaf, str]] = field(default_factory=list)  # whose pins pin it too, and why

    def pin(self, reasons: Iterable[str]) -> None:
        self.causes = joined(self.causes, reasons)
        self.reasons = joined(self.reasons, reasons)


Row = tuple[Leaf, ...]


def joined(*reasons: Iterable[str]) -> tuple[str, ...]:
    """The distinct reasons of all, in order of appearance, as many as are kept."""
    return tuple(dict.fromkeys(reason for some in reasons for reason in some))[:REASONS]


def resolve(row: Row) -> Row:
    """The leaves that ``row`` consists of by now: links followed, splits applied."""
    if all(leaf.link is None and leaf.parts is None for leaf in row):
        return row
    leaves: list[Leaf] = []
    for leaf in row:
        root = _root(leaf)
        leaves += [root] if root.parts is None else resolve(root.parts)
    return tuple(leaves)


def _root(leaf: Leaf) -> Leaf:
    root = leaf
    while root.link is not None:
        root = root.link
    while leaf.link is not None:
        leaf.link, leaf = root, leaf.link
    return root


def take(row: Row, size: int, why: str) -> tuple[Row, Row]:
    """The first ``size`` channels of ``row`` and the rest, splitting a leaf at the cut."""
    row = resolve(row)
    for index, leaf in enumerate(row):
        if size < leaf.size:
            head, tail = _split(leaf, size, why) if size else ((), (leaf,))
            return row[:index] + head, tail + row[index + 1 :]
        size -= leaf.size
    return row, ()


def _split(leaf: Leaf, size: int, why: str) -> tuple[Row, Row]:
    borders = (size, leaf.size - size)
    head, tail = (Leaf(size, leaf.name, leaf.reasons) for size in borders)
    leaf.parts = (head, tail)
    leaf.ties += [(head, f"{why} cuts it"), (tail, f"{why} cuts it")]
    for part in (head, tail) if leaf.reasons else ():
        part.ties.append((leaf, "pinned before the cut"))
    return (head,), (tail,)


def tie(first: Row, second: Row, why: str) -> None:
    """From now on both rows are ordered alike; they cover equally many channels."""
    first, second = resolve(first), resolve(second)
    while first and second and first != second:
        size = min(first[0].size, second[0].size)
        (a,), first = take(first, size, why)
        (b,), second = take(second, size, why)
        _unite(_root(a), _root(b), why)
        first, second = resolve(first), resolve(second)


def _unite(a: Leaf, b: Leaf, why: str) -> None:
    if a is b:
        return
    a.ties.append((b, f"{why} ties it to {b.name or 'a value'}"))
    b.ties.append((a, f"{why} ties it to {a.name or 'a value'}"))
    a.reasons = joined(a.reasons, b.reasons)
    b.link = a


@dataclass(frozen=True, eq=False)
class Channels:
    """A table of rows: ``rows[i, j]`` is the order where dims ``deps`` are at ``i, j``."""

    rows: Mapping[tuple[int, ...], Row]
    deps: tuple[int, ...] = ()

    @classmethod
    def of(cls, *row: Leaf) -> Channels:
        return cls({(): row})

    @classmethod
    def build(cls, make: Callable[[Place], Row], deps: Iterable[int], sizes: Sizes) -> Channels:
        """The table of ``make(place)`` over every place along ``deps``."""
        deps = tuple(sorted(deps))
        lengths = [range(int(sizes[dep])) for dep in deps]
        return cls({at: make(dict(zip(deps, at, strict=True))) for at in product(*lengths)}, deps)

    def at(self, place: Place) -> Row:
        return self.rows[tuple(place[dep] for dep in self.deps)]

    def pin(self, reasons: Iterable[str]) -> None:
        for row in self.rows.values():
            for leaf in resolve(row):
                leaf.pin(reasons)

    def moved(self, to: Callable[[int], int]) -> Channels:
        """The same table where dim ``d`` of the value has become dim ``to(d)``."""
        if not self.deps:
            return self
        deps = [to(dep) for dep in self.deps]
        order = sorted(range(len(deps)), key=deps.__getitem__)
        rows = {tuple(at[i] for i in order): row for at, row in self.rows.items()}
        return Channels(rows, tuple(deps[i] for i in order))

    def without(self, dim: int, why: str) -> Channels:
        """The table with its rows along ``dim`` tied: an op mixes the positions of that dim."""
        if dim not in self.deps:
            return self
        axis = self.deps.index(dim)
        kept: dict[tuple[int, ...], Row] = {}
        for at, row in self.rows.items():
            tie(kept.setdefault(at[:axis] + at[axis + 1 :], row), row, why)
        return Channels(kept, self.deps[:axis] + self.deps[axis + 1 :])

    def simplified(self) -> Channels:
        """The same without the dims that make no difference to the row."""
        for axis, dep in enumerate(self.deps):
            kept: dict[tuple[int, ...], Row] = {}
            if all(
                kept.setdefault(at[:axis] + at[axis + 1 :], row) == row
                for at, row in self.rows.items()
            ):
                return Channels(kept, tuple(d for d in self.deps if d != dep)).simplified()
        return self


@dataclass(frozen=True)
class Fixed:
    """A dim whose positions carry meaning, and why."""

    reasons: tuple[str, ...]


Dim = Channels | Fixed | None


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in the graph: its sizes, and how each dim is ordered."""

    shape: tuple[Size, ...]
    dims: tuple[Dim, ...]

    @classmethod
    def fixed(cls, shape: Sequence[Size], *reasons: str) -> Value:
        return cls(tuple(shape), tuple(None if n == 1 else Fixed(reasons) for n in shape))

    def pin(self, why: str) -> None:
        for dim in self.dims:
            pin(dim, (why,))


def pin(dim: Dim, reasons: Iterable[str]) -> Fixed | None:
    """Nothing along ``dim`` moves any more; what is left of it."""
    if isinstance(dim, Channels):
        dim.pin(reasons)
    return dim if dim is None or isinstance(dim, Fixed) else Fixed(tuple(reasons))


def as_channels(dim: Dim, size: int) -> Channels:
    """``dim`` as a row: a pinned leaf for a fixed one, a leaf of its own for a constant one."""
    if isinstance(dim, Channels):
        return dim
    leaf = Leaf(size)
    if isinstance(dim, Fixed):
        leaf.pin(dim.reasons)
    return Channels.of(leaf)


def unify(dims: Iterable[Dim], sizes: Sizes, why: str) -> Dim:
    """One dim that several operands share: their rows are tied; a fixed one fixes all.

    The tables are indexed by one common numbering of dims, whose sizes are ``sizes``. What is tied
    over all its places depends only on the dims that all tables have in common.
    """
    known = [dim for dim in dims if dim is not None]
    fixed = joined(*(dim.reasons for dim in known if isinstance(dim, Fixed)))
    rows = [dim for dim in known if isinstance(dim, Channels)]
    if fixed:
        for dim in rows:
            dim.pin(fixed)
        return Fixed(fixed)
    if len(rows) < 2:
        return rows[0] if rows else None
    first, *others = rows
    deps = sorted({dep for dim in rows for dep in dim.deps})
    for at in product(*(range(int(sizes[dep])) for dep in deps)):
        place = dict(zip(deps, at, strict=True))
        for other in others:
            tie(first.at(place), other.at(place), why)
    common = set(first.deps).intersection(*(dim.deps for dim in others))
    origin = dict.fromkeys(deps, 0)
    return Channels.build(lambda place: first.at({**origin, **place}), common, sizes)
