"""The JSON of a run: what was measured, on what, by which settings; written after every part."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import kinds, machine

Record = dict[str, Any]
SCHEMA = "permuquant benchmarks 1"


class Results:
    """Collects parts and writes them whole to ``path``, each as soon as it is there."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.start = time.perf_counter()
        self.record: Record = {
            "schema": SCHEMA,
            "device": machine.device(),
            "versions": machine.versions(),
            "settings": dict(settings),
            "clocks_idle": machine.clocks(),
            "parts": {},
            "skipped": {},
            "failed": {},
            "seconds": {},
        }

    def part(self, name: str, found: Any) -> None:
        """Keep ``found`` as what is known of the part so far."""
        self.record["parts"][name] = found
        self.write()

    def skip(self, name: str, why: str) -> None:
        self.record["skipped"][name] = why
        print(f"{name}: skipped, for {why}", flush=True)
        self.write()

    def fail(self, name: str, trace: str) -> None:
        self.record["failed"][name] = trace[-4000:]
        print(f"{name}: failed\n{trace}", flush=True)
        self.write()

    def took(self, name: str, seconds: float) -> None:
        self.record["seconds"][name] = round(seconds, 1)
        print(
            f"{name}: {seconds:.0f} s, {time.perf_counter() - self.start:.0f} s in all", flush=True
        )
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(self.record), indent=1, allow_nan=False)
        self.path.write_text(text + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """``value`` as JSON has it: numbers to six digits, no NaN and no infinity."""
    match value:
        case bool() | None | str() | int():
            return value
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(one) for key, one in value.items()}
        case list() | tuple():
            return [plain(one) for one in value]
        case _:
            return str(value)


def read(path: Path) -> Record | None:
    """The record in ``path``; None where another program wrote it.

    Where it lists every kernel of a step, they are told apart by the table of today.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    groups = [one for one in record["parts"].values() if isinstance(one, dict)]
    for side in (side for group in groups for side in group.get("sides", ())):
        listed = [kinds.Launch(k["name"], k["ms"], k["count"], k["rows"]) for k in _kernels(side)]
        whole = sum(one.milliseconds for one in listed)
        if listed and math.isclose(whole, side["kernel_ms"], rel_tol=1e-3):
            side["split_ms"] = kinds.split(listed)
    return record


def _kernels(side: Any) -> list[Record]:
    return list(side.get("kernels", ())) if isinstance(side, dict) else []
