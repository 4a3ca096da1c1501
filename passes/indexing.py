"""Ops that pick positions: slice, select, split, unbind, index by a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from .axes import Channels, Dim, Fixed, Size, Value, pin, take
from .calls import Call
from .equations import Undescribed


def narrow(call: Call, x: Value, dim: int, start: Any, length: Size) -> Value:
    """``length`` positions of ``dim`` from ``start`` on: the part of the row between two cuts."""
    dim %= len(x.shape)
    if length == x.shape[dim]:
        return x
    whole = isinstance(start, int) and isinstance(length, int) and isinstance(x.shape[dim], int)
    if whole and start < 0:
        start += x.shape[dim]
    dims: list[Dim] = []
    for index, order in enumerate(x.dims):
        if not isinstance(order, Channels):
            dims.append(order)
        elif index == dim:
            dims.append(
                _between(order, start, length, call.why) if whole else pin(order, (call.why,))
            )
        elif dim in order.deps and whole:
            part = _shifted(order, dim, start, int(length))
            dims.append(part.without(dim, call.why) if length == 1 else part)
        else:
            dims.append(order.without(dim, call.why))
    return Value((*x.shape[:dim], length, *x.shape[dim + 1 :]), tuple(dims))


def _between(order: Channels, start: int, length: Any, why: str) -> Channels:
    rows = {}
    for at, row in order.rows.items():
        _, tail = take(row, start, why)
        rows[at], _ = take(tail, length, why)
    return Channels(rows, order.deps)


def _shifted(order: Channels, dim: int, start: int, length: int) -> Channels:
    """The table where positions ``start ... start + length`` of ``dim`` are left."""
    axis = order.deps.index(dim)
    rows = {
        (*at[:axis], at[axis] - start, *at[axis + 1 :]): row
        for at, row in order.rows.items()
        if start <= at[axis] < start + length
    }
    return Channels(rows, order.deps)


def slice_(
    call: Call, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """``x[start:end]``; with a step the positions along ``dim`` are pinned."""
    dim %= len(x.shape)
    size, length = x.shape[dim], call.shape[dim]
    if step == 1 and isinstance(size, int) and isinstance(start or 0, int):
        return narrow(call, x, dim, slice(start, None).indices(size)[0], length)
    return _picked(call, x, dim, 1)


def select(call: Call, x: Value, dim: int, index: Any) -> Value:
    """``x[index]``: one position, which from then on cannot move."""
    dim %= len(x.shape)
    if not isinstance(index, int) or not isinstance(x.shape[dim], int):
        return _picked(call, x, dim, 0)
    one = narrow(call, x, dim, index, 1)
    pin(one.dims[dim], (call.why,))
    kept = [d for d in range(len(x.shape)) if d != dim]
    dims = (
        order.without(dim, call.why).moved(kept.index) if isinstance(order, Channels) else order
        for order in (one.dims[d] for d in kept)
    )
    return Value(call.shape, tuple(dims))


def _picked(call: Call, x: Value, dim: int, new: int, span: int = 1) -> Value:
    """``span`` dims from ``dim`` on replaced by ``new`` ones, picked by who knows what."""
    gone = range(dim, dim + span)
    for d in gone:
        pin(x.dims[d], (call.why,))
    dims: list[Dim] = []
    for d, order in enumerate(x.dims):
        if isinstance(order, Channels):
            for other in gone:
                order = order.without(other, call.why)
            order = order.moved(lambda d: d if d < dim else d + new - span)
        if d not in gone:
            dims.append(order)
    fresh = (None if n == 1 else Fixed((call.why,)) for n in call.shape[dim : dim + new])
    return Value(call.shape, (*dims[:dim], *fresh, *dims[dim:]))


def index_select(call: Call, x: Value, dim: int, index: Value) -> Value:
    """The positions along ``dim`` are pinned, all else passes."""
    index.pin(call.why)
    return _picked(call, x, dim % len(x.shape), 1)


def index(call: Call, x: Value, indices: Sequence[Value | None]) -> Value:
    """``x[:, i, j]`` by tensors ``i, j`` side by side; a mask counts as one index per dim of it."""
    given = [d for d, one in enumerate(indices) if one is not None]
    tensors = [one for one in indices if one is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        raise Undescribed
    for one in tensors:
        one.pin(call.why)
    kept = len(x.shape) - len(given)
    new = max(len(one.shape) for one in tensors)
    if len(call.shape) == kept + new:
        return _picked(call, x, given[0], new, len(given))
    if len(tensors) == 1 and len(call.shape) == len(x.shape) - new + 1:
        return _picked(call, x, given[0], 1, new)
    raise Undescribed


def split(call: Call, x: Value, _: object, dim: int = 0, **__: object) -> tuple[Value, ...]:
    """Chunk and split: consecutive parts of a row, told by the results' sizes."""
    sizes = [shape[dim] for shape in call.shapes]
    starts = accumulate(sizes[:-1], lambda a, b: a + b, initial=0)
    return tuple(narrow(call, x, dim, at, size) for at, size in zip(starts, sizes, strict=True))


def unbind(call: Call, x: Value, dim: int = 0) -> tuple[Value, ...]:
    """One value per position along ``dim``."""
    return tuple(
        select(Call((shape,), call.why), x, dim, at) for at, shape in enumerate(call.shapes)
    )
