"""Axis equations: what an op does to the order of its axes, in einops notation.

``"... k, n k, n -> ... n"`` is a linear: equal letters are one axis, permuted together. Besides
letters a term may hold

* ``...``  any number of leading dims, aligned from the right and broadcast;
* ``[c]``  an axis over which the op sums or normalises: its positions mix (softmax, a norm). A
  letter that is missing from the result is summed over, and mixes likewise;
* ``_``    an axis whose order has a meaning (a convolution's width): pinned;
* ``1``    an axis of size 1.

A letter that only the result has is an axis along which the value repeats. An operand may be absent
(a linear without bias), or have size 1 where others have more (broadcasting).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .axes import Channels, Dim, Fixed, Size, Value, pin, unify


class Undescribed(Exception):
    """The rule says nothing about this form of the op: every axis it touches is pinned."""


@dataclass(frozen=True)
class Letters:
    """One side of an equation, read against the ranks at hand."""

    names: tuple[str, ...]
    mixed: frozenset[str]
    ordered: frozenset[str]


def read(equation: str, operands: Sequence[Value | None], shape: Sequence[Size], why: str) -> Value:
    """The result of an op, from its operands; ties and pins their axes as the equation says.

    ``shape`` is the result's. Raises ``Undescribed`` if the ranks do not fit the equation.
    """
    terms, result = parse(equation)
    if len(operands) > len(terms):
        raise Undescribed
    present = [
        (value, _letters(term, len(value.shape), f"{index}"))
        for index, (term, value) in enumerate(zip(terms, operands, strict=False))
        if value is not None
    ]
    out = _letters(result, len(shape), "result")
    frame = {
        name: index
        for index, name in enumerate(
            dict.fromkeys(name for _, letters in present for name in letters.names)
        )
    }
    sizes = _sizes(frame, present)
    merged = {
        name: unify(_occurrences(name, present, frame, sizes, why), sizes, why) for name in frame
    }
    mixed = {name for _, letters in present for name in letters.mixed | letters.ordered}
    mixed |= set(frame) - set(out.names)
    place = {frame[name]: index for index, name in enumerate(out.names) if name in frame}
    dims: list[Dim] = []
    for name in out.names:
        dim = merged.get(name)
        if isinstance(dim, Channels):
            for gone in sorted(frame[other] for other in mixed):
                dim = dim.without(gone, why)
            dim = dim.moved(place.__getitem__)
        dims.append(Fixed((why,)) if name in out.ordered else dim)
    return Value(tuple(shape), tuple(dims))


@cache
def parse(equation: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The terms of the operands and of the result."""
    operands, result = equation.split("->")
    return tuple(tuple(term.split()) for term in operands.split(",")), tuple(result.split())


def _letters(term: tuple[str, ...], rank: int, operand: str) -> Letters:
    """Names for ``rank`` dims: ``...`` becomes ``.1 .0``, anonymous dims get names of their own."""
    spare = rank - len(term) + ("..." in term)
    if spare < 0 or (spare and "..." not in term):
        raise Undescribed
    names: list[str] = []
    for position, token in enumerate(term):
        if token == "...":
            names += [f".{index}" for index in reversed(range(spare))]
        elif token in ("_", "1"):
            names.append(f"{token}{operand}.{position}")
        else:
            names.append(token.strip("[]"))
    return Letters(
        tuple(names),
        frozenset(token.strip("[]") for token in term if token.startswith("[")),
        frozenset(name for name in names if name.startswith("_")),
    )


def _sizes(frame: dict[str, int], present: list[tuple[Value, Letters]]) -> list[Size]:
    """The size of each letter: that of the operands that do not broadcast."""
    sizes: list[Size] = [1] * len(frame)
    for value, letters in present:
        for name, size in zip(letters.names, value.shape, strict=True):
            if size != 1:
                sizes[frame[name]] = size
    return sizes


def _occurrences(
    letter: str,
    present: list[tuple[Value, Letters]],
    frame: dict[str, int],
    sizes: list[Size],
    why: str,
) -> list[Dim]:
    found: list[Dim] = []
    for value, letters in present:
        for name, size, dim in zip(letters.names, value.shape, value.dims, strict=True):
            if name != letter or (size == 1 and sizes[frame[name]] != 1):
                continue
            if name in letters.ordered:
                dim = pin(dim, (why,))
            if isinstance(dim, Channels):
                dim = dim.moved(lambda d, names=letters.names: frame[names[d]])  # type: ignore[misc]
            found.append(dim)
    return found
