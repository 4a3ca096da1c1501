"""A unit: the parameters that are frozen together, and their life: observe, freeze, serve.

A unit is a connected component of graphs and parameters: all graphs that were ever called with a
parameter of it belong to it (another resolution, classifier-free guidance at another batch size).
Under regional compilation every block is a unit of its own, though all share one compiled graph.

Entries (packed weights, reordered copies) are found by the parameter object passed at call time and
compared with its staleness key, so that a loaded, merged or moved weight is packed again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from .entries import Entry, Maker, bytes_by_kind
from .errors import Refused
from .needs import Needs, Rename
from .options import Options
from .permutation import Permutation
from .plan import Axis, Groups, Orders, Plan, Statistics, axis_order
from .released import readable, restore, staleness_key

log = logging.getLogger(__name__)

OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""parameter -> (its unit, its name there); entries die with the parameter."""


class Observing(Protocol):
    """What a unit needs of ``passes.calibrate.Observer``."""

    def begin_call(self, inputs: Mapping[str, Tensor]) -> None: ...
    def observe(self, x: Tensor, weights: Sequence[str]) -> None: ...
    def end_call(self) -> None: ...
    def finish(self) -> dict[str, Statistics]: ...
    def warnings(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Passes:
    """The passes that a unit runs when it freezes, handed in by the backend."""

    observer: Callable[[int], Observing]
    merge: Callable[[Sequence[Groups]], Groups]
    rename: Rename
    extend: Callable[[Mapping[Axis, Permutation], Groups], tuple[Orders, tuple[str, ...]]]
    plan: Callable[..., Plan]
    fold: Callable[[str, Tensor, Groups, Orders], Tensor]
    revise: Callable[[Plan, Groups, Orders], Plan]
    nothing_to_quantise: Callable[..., str | None]
    frozen: Callable[[Unit, Mapping[str, Statistics]], None]  # told once a unit is frozen


class Unit:
    """Parameters frozen together. Its methods take the lock themselves; reads are lock-free."""

    def __init__(self, options: Options, passes: Passes) -> None:
        self.options = options
        self.passes = passes
        self.lock = threading.RLock()
        self.calls = 0
        self.serving: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of bindings; see there
        self.merged_away = False
        self.failure: str | None = None
        self.plan: Plan | None = None
        self.orders: Orders = {}
        self.notes: tuple[str, ...] = ()
        self.seconds: dict[str, float] = {}
        self.needs = Needs()
        self.observer = passes.observer(options.seed)
        self._references: dict[str, TensorWeakRef] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._entries: dict[str, Entry] = {}

    # ---------------------------------------------------------------- parameters and graphs

    @property
    def frozen(self) -> bool:
        return self.plan is not None

    @property
    def ready(self) -> bool:
        return self.failure is None and self.calls >= self.options.observed_calls

    def parameters(self) -> dict[str, Tensor]:
        """The unit's parameters that are still alive, by name."""
        alive = {name: reference() for name, reference in self._references.items()}
        return {name: tensor for name, tensor in alive.items() if tensor is not None}

    def adopt(self, tensor: Tensor, wish: str) -> str:
        """Make ``tensor`` a parameter of this unit; returns its name, ``wish`` if that is free.

        A parameter that died leaves its name to one of the same shape.
        """
        name, n = wish, 2
        while name in self._references and (
            self._references[name]() is not None or self._shapes[name] != tensor.shape
        ):
            name, n = f"{wish}#{n}", n + 1
        self._references[name], self._shapes[name] = TensorWeakRef(tensor), tensor.shape
        self._entries.pop(name, None)
        OWNERS[tensor] = (self, name)
        return name

    def join(self, needs: Needs) -> None:
        """Take one more graph over this unit's parameters (names are the unit's).

        After freezing, orders that the graph does not allow are given up and the weights packed
        again from their originals; ``Refused`` where those were dropped.
        """
        with self.lock:
            joint = self.needs.joined(needs, self.passes.merge)
            if self.plan is None:
                self.needs = joint
            else:
                self._extend(joint)

    def _extend(self, joint: Needs) -> None:
        """Bring a frozen unit into an order that is legal in one more graph."""
        assert self.plan is not None
        segments = self.needs.groups.segments
        before = {axis: axis_order(axis, self.needs.groups, self.orders) for axis in segments}
        orders, culprits = self.passes.extend(before, joint.groups)
        moved = {
            axis.parameter
            for axis, order in before.items()
            if axis_order(axis, joint.groups, orders) != order
        }
        tensors = self.parameters()
        self._refuse_if_dropped(moved, tensors, f"in another order ({'; '.join(culprits)})")
        asked = self.needs.read_otherwise(joint)
        self._refuse_if_dropped(asked, tensors, "as it was before packing")
        known = {linear.weight for linear in self.needs.linears}
        late = [linear for linear in joint.linears if linear.weight not in known]
        plan = self.plan
        if late:
            rtn = replace(self.options, recipe="rtn")
            added = self.passes.plan(joint.groups, late, joint.kept, {}, tensors, rtn).linears
            reason = "first seen after freezing: order kept"
            plan = replace(
                plan, linears=plan.linears + tuple(replace(one, reason=reason) for one in added)
            )
        self.needs, self.orders = joint, orders
        self.plan = self.passes.revise(plan, joint.groups, orders)
        self.notes += tuple(f"order given up: {culprit}" for culprit in culprits)
        for name in moved | asked:
            self._entries.pop(name, None)
        self.serving = WeakKeyDictionary()

    def _refuse_if_dropped(
        self, names: Iterable[str], tensors: Mapping[str, Tensor], how: str
    ) -> None:
        for name in sorted(names):
            if not readable(tensors.get(name)):
                raise Refused(
                    f"permuquant: this call needs {name} {how}, but its original was dropped; "
                    "compile with release_weights='backup', or calibrate with calls of this kind "
                    "too"
                )

    # ---------------------------------------------------------------- observe -> freeze

    def freeze(self) -> None:
        """Make the plan, fold and pack; on any failure the unit stays in its own precision."""
        with self.lock:
            if self.plan is not None:
                return
            start = time.perf_counter()
            seen, tensors, needs = self.observer.finish(), self.parameters(), self.needs
            plan = self.passes.plan(
                needs.groups, needs.linears, needs.kept, seen, tensors, self.options
            )
            planned = time.perf_counter()
            maker = self._maker(plan.orders)
            self._entries = maker.entries(tensors)
            self.plan, self.orders, self.failure = plan, plan.orders, None
            self.notes = (*self.observer.warnings(), *maker.not_given_back(tensors))
            self.observer = self.passes.observer(self.options.seed)  # lets the rows go
            self.serving = WeakKeyDictionary()
            self.seconds = {"plan": planned - start, "pack": time.perf_counter() - planned}
            self.passes.frozen(self, seen)
            log.info("frozen: %d linears, %s", len(plan.linears), self.seconds)

    def nothing_to_quantise(self) -> str | None:
        """Why none of the unit's linears can be quantised; None if one can."""
        return self.passes.nothing_to_quantise(self.needs.linears, self.needs.kept, self.options)

    def _maker(self, orders: Orders) -> Maker:
        def fold(name: str, tensor: Tensor) -> Tensor:
            return self.passes.fold(name, tensor, self.needs.groups, orders)

        return Maker(fold, self.needs.packed, self.needs.dense, self.options)

    def thaw(self) -> None:
        """Back to observing, every original restored. ``Refused`` if originals were dropped."""
        with self.lock:
            for name, tensor in self.parameters().items():
                if not readable(tensor):
                    raise Refused(
                        f"permuquant: {name} was dropped after packing and can't be restored"
                    )
            for tensor in self.parameters().values():
                restore(tensor)
            self.plan, self.orders, self._entries, self.calls = None, {}, {}, 0
            self.failure, self.notes = None, ()
            self.observer = self.passes.observer(self.options.seed)
            self.serving = WeakKeyDictionary()

    # ---------------------------------------------------------------- serve

    def entry(self, name: str, tensor: Tensor) -> Entry:
        """What serves in place of ``tensor``; made again if its values have changed since."""
        entry = self._entries.get(name)
        if entry is not None and entry.key == staleness_key(tensor):
            return entry
        with self.lock:
            maker = self._maker(self.orders)
            entry = self._entries[name] = maker.entry(name, tensor)
            maker.drop_backups([tensor])
            self.serving = WeakKeyDictionary()
            return entry

    def refresh(self) -> None:
        """Pack again, at the next call, every weight whose original is still at hand."""
        with self.lock:
            for name, tensor in self.parameters().items():
                if readable(tensor):
                    self._entries.pop(name, None)
            self.serving = WeakKeyDictionary()

    def served(self) -> dict[str, tuple[Tensor, ...]]:
        """What serves in place of parameters, by name; those that serve as they are left out."""
        return {name: entry.tensors for name, entry in self._entries.items() if entry.tensors}

    def memory(self) -> dict[str, int]:
        """Bytes on the model's devices, by what they hold."""
        return bytes_by_kind(self._entries, self.parameters())
