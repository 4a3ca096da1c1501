"""Ops that cut, merge and repeat dims: reshape and its kin.

A reshape is a sequence of regroupings of neighbouring dims. Merging ``h`` fixed positions with a
row of ``d`` channels lays the rows side by side; splitting a row of ``h * d`` channels cuts it into
a table of rows, one per position. So flattened heads keep one permutation per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import sympy

from .axes import PARTS, Channels, Dim, Fixed, Row, Size, Value, joined, pin, take
from .calls import Call
from .equations import Undescribed

Place = Callable[[int], int]  # the number of a dim -> its number afterwards


def reshape(call: Call, x: Value, *_: object, **__: object) -> Value:
    """View, flatten, unflatten, squeeze, unsqueeze, ...: all told by the two shapes."""
    shape = call.shape
    if 0 in x.shape or 0 in shape:
        raise Undescribed
    source = _squeeze(x)
    goal = tuple(size for size in shape if size != 1)
    value = source
    for (i, j), (k, m) in reversed(list(pairwise(cuts(source.shape, goal)))):
        value = regroup(value, i, k - i, goal[j:m], call.why)
    kept = [index for index, size in enumerate(shape) if size != 1]
    dims: list[Dim] = [None] * len(shape)
    for index, dim in zip(kept, value.dims, strict=True):
        dims[index] = dim.moved(kept.__getitem__) if isinstance(dim, Channels) else dim
    return Value(shape, tuple(dims))


def _squeeze(x: Value) -> Value:
    kept = [index for index, size in enumerate(x.shape) if size != 1]
    dims = (x.dims[index] for index in kept)
    return Value(
        tuple(x.shape[index] for index in kept),
        tuple(dim.moved(kept.index) if isinstance(dim, Channels) else dim for dim in dims),
    )


def cuts(a: Sequence[Size], b: Sequence[Size]) -> list[tuple[int, int]]:
    """Where two shapes of equally many elements have a border in common, ends included.

    ``i, j`` is one if the sizes before, or those after, multiply to the same; sizes may be symbols.
    """
    before = {total: i for i, total in enumerate(_products(a))}
    after = {total: i for i, total in enumerate(_products(a[::-1]))}
    found = {(0, 0), (len(a), len(b))}
    for j, total in enumerate(_products(b)):
        if total in before:
            found.add((before[total], j))
    for j, total in enumerate(_products(b[::-1])):
        if total in after:
            found.add((len(a) - after[total], len(b) - j))
    borders = sorted(found)
    rising = all(i < k and j < m for (i, j), (k, m) in pairwise(borders))
    return borders if rising else [borders[0], borders[-1]]


def _products(sizes: Sequence[Size]) -> list[Size]:
    products: list[Size] = [1]
    for size in sizes:
        total = products[-1] * size
        products.append(total if isinstance(total, int) else sympy.expand(total))
    return products


def regroup(x: Value, start: int, count: int, sizes: Sequence[Size], why: str) -> Value:
    """``x`` with ``count`` dims from ``start`` on replaced by dims of ``sizes``, elements in order.

    A row of ``x`` that depends on one of them afterwards depends on the new ones.
    """
    if count == len(sizes) == 1:
        return x
    gone = range(start, start + count)
    old = x.shape[start : start + count]
    shape = (*x.shape[:start], *sizes, *x.shape[start + count :])

    def place(dim: int) -> int:
        return dim if dim < start else dim + len(sizes) - count

    outside = [
        _reindexed(dim, gone, old, sizes, place, why)
        for i, dim in enumerate(x.dims)
        if i not in gone
    ]
    flat = _merge(x.dims[start : start + count], gone, old, why)
    inside = _split(flat, start, sizes, place, why)
    return Value(shape, (*outside[:start], *inside, *outside[start:]))


def _reindexed(
    dim: Dim, gone: range, old: Sequence[Size], sizes: Sequence[Size], place: Place, why: str
) -> Dim:
    """A dim outside the regrouped ones, its table indexed by the new dims instead of the old."""
    if not isinstance(dim, Channels):
        return dim
    touched = [dep for dep in dim.deps if dep in gone]
    if touched and not (_count(old) and _count(sizes)):
        for dep in touched:
            dim = dim.without(dep, why)
        touched = []
    if not touched:
        return dim.moved(place)
    moved = {place(dep): dep for dep in dim.deps if dep not in gone}
    new = range(gone.start, gone.start + len(sizes))
    strides = [math.prod(map(int, sizes[i + 1 :])) for i in range(len(sizes))]

    def row(at: Mapping[int, int]) -> Row:
        flat = sum(at[d] * stride for d, stride in zip(new, strides, strict=True))
        before = {dep: at[d] for d, dep in moved.items()}
        for d, size in zip(reversed(gone), reversed(old), strict=True):
            flat, before[d] = divmod(flat, int(size))
        return dim.at(before)

    known = _lengths(dim)
    lengths = {place(dep): known[dep] for dep in moved.values()}
    lengths.update(zip(new, sizes, strict=True))
    return Channels.build(row, (*moved, *new), lengths).simplified()


def _lengths(dim: Channels) -> dict[int, Size]:
    """The sizes of the dims that the table is indexed by."""
    ends = zip(*dim.rows, strict=True)
    return {dep: max(end) + 1 for dep, end in zip(dim.deps, ends, strict=True)}


def _count(sizes: Sequence[Size]) -> int:
    """The number of places along dims of ``sizes``; 0 if symbolic or too many for a table."""
    count = math.prod(sizes)
    return count if isinstance(count, int) and count <= PARTS else 0


def _merge(dims: Sequence[Dim], gone: range, sizes: Sequence[Size], why: str) -> Dim:
    """``h`` positions, a row of ``d`` channels each: one row of ``h * d`` channels."""
    *outer, last = dims
    if not any(outer):
        return last if not outer or last is None else _repeated(last, gone, sizes, why)
    for dim in outer:
        pin(dim, (why,))
    if not isinstance(last, Channels):
        return Fixed(joined(*(dim.reasons for dim in dims if isinstance(dim, Fixed))) or (why,))
    return _repeated(last, gone, sizes, why)


def _repeated(last: Dim, gone: range, sizes: Sequence[Size], why: str) -> Dim:
    heads = list(gone[:-1])
    if not isinstance(last, Channels) or not _count(sizes[:-1]):
        return pin(last, (why,))

    def row(at: Mapping[int, int]) -> Row:
        places = product(*(range(int(size)) for size in sizes[:-1]))
        return tuple(
            leaf
            for head in places
            for leaf in last.at({**at, **dict(zip(heads, head, strict=True))})
        )

    outside = (dep for dep in last.deps if dep not in gone)
    return Channels.build(row, outside, _lengths(last))


def _split(dim: Dim, start: int, sizes: Sequence[Size], place: Place, why: str) -> list[Dim]:
    """One row of ``h * d`` channels: ``h`` positions, a row of ``d`` channels each."""
    if len(sizes) == 1:
        return [dim.moved(place) if isinstance(dim, Channels) else dim]
    count = _count(sizes[:-1])
    if not isinstance(dim, Channels) or not count or not isinstance(sizes[-1], int):
        return [pin(dim, (why,))] * len(sizes)
    pieces = {at: _pieces(row, count, sizes[-1], why) for at, row in dim.rows.items()}
    table = Channels(pieces, dim.deps).moved(place)  # type: ignore[arg-type]
    heads = range(start, start + len(sizes) - 1)

    def row(at: Mapping[int, int]) -> Row:
        index = 0
        for head, size in zip(heads, sizes, strict=False):
            index = index * int(size) + at[head]
        piece: Row = table.at(at)[index]  # type: ignore[assignment]
        return piece

    lengths = {**_lengths(table), **dict(zip(heads, sizes, strict=False))}
    return [*[Fixed((why,))] * len(heads), Channels.build(row, (*table.deps, *heads), lengths)]


def _pieces(row: Row, count: int, size: int, why: str) -> tuple[Row, ...]:
    pieces = []
    for _ in range(count):
        piece, row = take(row, size, why)
        pieces.append(piece)
    return tuple(pieces)


def expand(call: Call, x: Value, *_: object, **__: object) -> Value:
    """New dims and dims of size 1 repeat the value: any order does along them."""
    new = len(call.shape) - len(x.shape)
    dims = (
        dim.moved(lambda d: d + new) if isinstance(dim, Channels) else dim
        for dim, old, size in zip(x.dims, x.shape, call.shape[new:], strict=True)
        for dim in [None if old == 1 != size else dim]
    )
    return Value(call.shape, (*[None] * new, *dims))


def repeat(call: Call, x: Value, times: Sequence[Any], *_: object) -> Value:
    """``x.repeat(2, 3)``: each dim ``n`` is expanded to ``2 n`` and flattened."""
    times = [*[1] * (len(x.shape) - len(times)), *times]
    new = len(times) - len(x.shape)
    value = expand(Call(((1,) * new + x.shape,), call.why), x)
    for dim, (count, size) in enumerate(zip(times, value.shape, strict=True)):
        if count != 1:
            value = _repeat_dim(value, dim, (count, size), 0, call)
    return Value(call.shape, value.dims)


def repeat_interleave(
    call: Call, x: Value, repeats: Any, dim: int | None = None, *_: object, **__: object
) -> Value:
    """``a a b b``: each position is repeated where it stands."""
    if isinstance(repeats, Value) or dim is None:
        raise Undescribed
    dim %= len(x.shape)
    return Value(call.shape, _repeat_dim(x, dim, (x.shape[dim], repeats), 1, call).dims)


def _repeat_dim(x: Value, dim: int, pair: tuple[Size, Size], new: int, call: Call) -> Value:
    """Dim ``dim`` becomes two, ``pair``, the one at ``new`` repeating; then they are merged."""
    at = dim + new

    def place(d: int) -> int:
        return d + (d >= at)

    dims = [d.moved(place) if isinstance(d, Channels) else d for d in x.dims]
    dims.insert(at, None)
    shape = (*x.shape[:dim], *pair, *x.shape[dim + 1 :])
    if pair[1 - new] == 1:
        dims[dim + 1 - new] = None
    return regroup(Value(shape, tuple(dims)), dim, 2, (pair[0] * pair[1],), call.why)
