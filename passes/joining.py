"""Ops that put values beside each other: cat, stack and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .axes import (
    PARTS,
    Channels,
    Dim,
    Fixed,
    Leaf,
    Place,
    Row,
    Size,
    Value,
    as_channels,
    joined,
    pin,
    resolve,
    unify,
)
from .calls import Call


def cat(call: Call, values: Sequence[Value], dim: int = 0) -> Value:
    """Rows side by side along ``dim``; every other dim is shared by all parts."""
    rank = len(call.shape)
    parts = [value for value in values if len(value.shape) == rank]
    return _join(call, parts, dim % rank, table=False)


def stack(call: Call, values: Sequence[Value], dim: int = 0) -> Value:
    """Parts along a new dim: a table of their rows, indexed by that dim."""
    dim %= len(call.shape)
    parts = [
        Value(
            (*value.shape[:dim], 1, *value.shape[dim:]),
            (*_beyond(value.dims[:dim], dim), None, *_beyond(value.dims[dim:], dim)),
        )
        for value in values
    ]
    return _join(call, parts, dim, table=True)


def _beyond(dims: Sequence[Dim], new: int) -> list[Dim]:
    return [
        dim.moved(lambda d: d + (d >= new)) if isinstance(dim, Channels) else dim for dim in dims
    ]


def _join(call: Call, parts: Sequence[Value], dim: int, table: bool) -> Value:
    depend = any(isinstance(d, Channels) and dim in d.deps for part in parts for d in part.dims)
    sizes = [part.shape[dim] for part in parts]
    few = all(isinstance(size, int) for size in sizes) and 1 < sum(sizes) <= PARTS
    table = bool((table or depend) and few)
    dims: list[Dim] = []
    for index in range(len(call.shape)):
        orders = [part.dims[index] for part in parts]
        if index == dim:
            joint = _fixed(orders, call) if table else _side_by_side(orders, sizes, call)
        elif table and any(isinstance(order, Channels) for order in orders):
            joint = _stacked(orders, sizes, dim, int(call.shape[index]), call)
        else:
            joint = unify(
                (_without(order, dim, call.why) for order in orders), call.shape, call.why
            )
        dims.append(joint)
    return Value(call.shape, tuple(dims))


def _without(order: Dim, dim: int, why: str) -> Dim:
    return order.without(dim, why) if isinstance(order, Channels) else order


def _fixed(orders: Sequence[Dim], call: Call) -> Fixed:
    """The dim along which parts are told apart by position."""
    for order in orders:
        pin(order, (call.why,))
    reasons = joined(*(order.reasons for order in orders if isinstance(order, Fixed)))
    return Fixed(reasons or (call.why,))


def _side_by_side(orders: Sequence[Dim], sizes: Sequence[Size], call: Call) -> Dim:
    if not any(isinstance(order, Channels) for order in orders):
        return orders[0] if len(orders) == 1 else _fixed(orders, call)
    if not all(isinstance(size, int) for size in sizes):
        return _fixed(orders, call)
    rows = [as_channels(order, int(size)) for order, size in zip(orders, sizes, strict=True)]
    deps = {dep for row in rows for dep in row.deps}

    def joint(at: Place) -> Row:
        return tuple(leaf for row in rows for leaf in row.at(at))

    return Channels.build(joint, deps, call.shape)


def _stacked(
    orders: Sequence[Dim], sizes: Sequence[Size], dim: int, size: int, call: Call
) -> Channels:
    """The tables of the parts one after another along ``dim``."""
    rows = [as_channels(order, size) for order in orders]
    owner = [(row, at) for row, n in zip(rows, sizes, strict=True) for at in range(int(n))]

    def row(at: Place) -> Row:
        part, position = owner[at[dim]]
        return part.at({**at, dim: position})

    return Channels.build(row, {dim, *(dep for row in rows for dep in row.deps)}, call.shape)


def pad(
    call: Call, x: Value, widths: Sequence[Any], mode: str = "constant", value: Any = None
) -> Value:
    """Constant padding puts pinned channels beside the row; other modes pin the padded dims."""
    dims = list(x.dims)
    for pair in range(len(widths) // 2):
        left, right = widths[2 * pair], widths[2 * pair + 1]
        dim = len(x.shape) - 1 - pair
        if left == right == 0:
            continue
        dims = [_without(order, dim, call.why) for order in dims]
        dims[dim] = _padded(dims[dim], left, right, x.shape[dim], mode, call)
    return Value(call.shape, tuple(dims))


def _pinned(size: int, why: str) -> Leaf:
    leaf = Leaf(size)
    leaf.pin((why,))
    return leaf


def _padded(order: Dim, left: Any, right: Any, size: Size, mode: str, call: Call) -> Dim:
    known = isinstance(left, int) and isinstance(right, int) and left >= 0 and right >= 0
    if not known or mode != "constant" or not isinstance(order, Channels):
        return pin(order, (call.why,)) or Fixed((call.why,))
    sides = [(_pinned(width, call.why),) if width else () for width in (left, right)]
    rows = {at: (*sides[0], *resolve(row), *sides[1]) for at, row in order.rows.items()}
    return Channels(rows, order.deps)
