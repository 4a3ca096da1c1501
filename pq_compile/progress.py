"""One progress bar for all units that are being observed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from tqdm.auto import tqdm


@dataclass
class _Bar:
    """A bar and the units that still move it."""

    shown: Any
    units: WeakSet[Any] = field(default_factory=WeakSet)


_LOCK = threading.Lock()
_BARS: dict[int | None, _Bar] = {}


def observed(unit: object, calls: int | None) -> None:
    """Count one observed call of ``unit``, of ``calls`` in all (None: until the user ends it)."""
    with _LOCK:
        bar = _BARS.get(calls)
        if bar is None:
            shown = tqdm(total=calls and 0, desc="permuquant: calibrating", unit="call")
            bar = _BARS[calls] = _Bar(shown)
        if unit not in bar.units:
            bar.units.add(unit)
            if calls is not None:
                bar.shown.total += calls
        bar.shown.update()


def done(unit: object) -> None:
    """``unit`` is not observed any more; a bar closes with the last of its units that live."""
    with _LOCK:
        for calls, bar in list(_BARS.items()):
            bar.units.discard(unit)
            if not bar.units:
                bar.shown.close()
                del _BARS[calls]
