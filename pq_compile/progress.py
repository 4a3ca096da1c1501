"""One progress bar for all units that are being observed."""

from __future__ import annotations

import threading
from typing import Any

from tqdm.auto import tqdm

_LOCK = threading.Lock()
_BARS: dict[int | None, Any] = {}


def observed(unit: object, calls: int | None) -> None:
    """Count one observed call of ``unit``, of ``calls`` in all (None: until the user ends it)."""
    with _LOCK:
        bar = _BARS.get(calls)
        if bar is None:
            bar = _BARS[calls] = tqdm(total=0, desc="permuquant: calibrating", unit="call")
            bar.seen = set()
        if id(unit) not in bar.seen:
            bar.seen.add(id(unit))
            bar.total = None if calls is None else bar.total + calls
        bar.update()


def done(unit: object) -> None:
    """``unit`` is not observed any more; the bar closes with its last unit."""
    with _LOCK:
        for calls, bar in list(_BARS.items()):
            bar.seen.discard(id(unit))
            if not bar.seen:
                bar.close()
                del _BARS[calls]
