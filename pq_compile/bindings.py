"""The parameters that one graph is run with, and what serves in their place.

Both are looked at in every call, a thousand parameters at a time, so every question is put to all
of them at once, in C:

    are they the same objects?    by weak references: nothing here keeps a model alive
    was a released one changed?   none was, as long as ``last_change()`` is the same object
    was a kept one changed?       ``values_key`` of those that something else serves for
    did the unit change?          it drops its ``serving`` then, and with it what served so far
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import call, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .entries import Entry
from .released import Released, last_change
from .unit import Unit

Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
Source = tuple[int, int | None]
"""What an input of a lowered graph is: an argument, or a packed field of it."""


def pick(indices: Sequence[int]) -> Pick:
    """A function from a tuple to the tuple of its items at ``indices``."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)


@dataclass(frozen=True, eq=False)
class Binding:
    """The parameters one graph is run with, by weak references, and the unit they belong to."""

    unit: Unit
    names: Mapping[int, str]  # argument -> the unit's name
    references: tuple[weakref.ref[Tensor], ...]

    @property
    def alive(self) -> bool:
        return not self.unit.merged_away and all(ref() is not None for ref in self.references)

    def matches(self, parameters: tuple[Tensor, ...]) -> bool:
        """Whether they are these very objects."""
        same = all(map(is_, parameters, map(call, self.references)))
        return same and not self.unit.merged_away


@dataclass(frozen=True, eq=False)
class Serving:
    """The inputs of a lowered graph, as last looked up; it is replaced as a whole.

    Its inputs are the items ``head`` of the arguments and ``copies``, in a row, and then ``tail``.
    """

    change: object  # the last one to a released parameter that is in here
    kept: Pick  # arguments that something else serves for, though they are still there
    key: tuple[list[int], ...]  # of their values
    head: Pick
    copies: tuple[Tensor, ...]
    tail: tuple[Tensor, ...]

    def fresh(self, args: tuple[Any, ...]) -> bool:
        """Whether no parameter was written, replaced or moved since."""
        if self.change is not last_change():
            return False
        return not self.key or values_key(self.kept(args)) == self.key

    def inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.head(args + self.copies) + self.tail


def look_up(binding: Binding, sources: Sequence[Source], args: tuple[Any, ...]) -> Serving:
    """What serves for the parameters in ``args``, packing what has changed.

    Called with the unit's lock held. A write by another thread meanwhile makes the result stale, as
    it is judged by what was known before: ``change``, and the keys the entries were made with.
    """
    change = last_change()
    entries = {i: binding.unit.entry(name, args[i]) for i, name in binding.names.items()}
    served = [_stand_in(entries.get(index), field) for index, field in sources]
    as_they_are = [i for i, tensor in enumerate(served) if tensor is None]
    end = as_they_are[-1] + 1 if as_they_are else 0
    copies = tuple(tensor for tensor in served[:end] if tensor is not None)
    later = iter(range(len(args), len(args) + len(copies)))
    head = [
        index if tensor is None else next(later)
        for (index, _), tensor in zip(sources[:end], served, strict=False)
    ]
    tail = tuple(tensor for tensor in served[end:] if tensor is not None)
    kept = [i for i, e in entries.items() if e.tensors and not isinstance(args[i], Released)]
    key = tuple(map(list, zip(*(entries[i].key[:3] for i in kept), strict=True)))
    return Serving(change, pick(kept), key, pick(head), copies, tail)


def values_key(parameters: Sequence[Tensor]) -> tuple[list[int], ...]:
    """The storages, addresses and versions of many parameters, none of them released.

    Device and dtype are left out: the one belongs to the storage, the other is guarded by Dynamo.
    """
    with torch._C.DisableTorchFunctionSubclass():
        storages = [storage._cdata for storage in map(Tensor.untyped_storage, parameters)]
        try:
            versions = [*map(_VERSION, parameters)]
        except RuntimeError:  # an inference tensor is among them, which counts no writes
            versions = [-1 if one.is_inference() else one._version for one in parameters]
        return storages, [*map(Tensor.data_ptr, parameters)], versions


_VERSION = Tensor._version.__get__  # type: ignore[attr-defined]


def _stand_in(entry: Entry | None, field: int | None) -> Tensor | None:
    """What serves for an argument with this entry; None where it serves as it is."""
    if entry is None or field is None:
        return None if entry is None else entry.folded
    assert entry.packed is not None
    return entry.packed[field]
