"""The user's options, parsed and checked once at the door."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Refused

CHOICES = {
    "recipe": ("best", "permuquant", "rtn", "random"),
    "format": ("nvfp4", "mxfp4", "int4", "int3", "none"),
    "scheme": ("auto", "w4a4", "w4a8", "w4a16"),
    "route": ("auto", "fp8", "half", "native", "fastest", "in_loop", "reference"),
    "mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "release_weights": ("backup", "drop", "keep"),
}
NEEDS_NO_DATA = ("rtn", "random")


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(model, backend="permuquant", options={...})`` accepts.

    Raises ``Refused`` for a value outside its choices or range, naming the option.
    """

    recipe: str = "best"
    format: str = "nvfp4"
    scheme: str = "auto"
    route: str = "auto"
    mode: str = "default"
    alpha: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    tau: float = 0.02
    calibration_calls: int = 64
    seed: int = 0
    skip: tuple[str, ...] = ()
    release_weights: str = "backup"
    plan: str | None = None
    dump: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise Refused(
                    f"permuquant: {name}={value!r} is not one of {', '.join(choices)}"
                    f"{_nearest(value, choices)}"
                )
        if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
            raise Refused(
                f"permuquant: alpha={self.alpha!r} must be one or more numbers between 0 and 1"
            )
        if not self.tau >= 0:
            raise Refused(f"permuquant: tau={self.tau!r} must be a number of at least 0")
        if self.calibration_calls < 0:
            raise Refused(
                f"permuquant: calibration_calls={self.calibration_calls!r} must be at least 0"
            )
        if self.calibration_calls == 0 and self.needs_data:
            raise Refused(
                f"permuquant: recipe {self.recipe!r} chooses by data, so calibration_calls must be "
                f"at least 1; recipes that need none: {', '.join(NEEDS_NO_DATA)}"
            )

    @property
    def needs_data(self) -> bool:
        return self.recipe not in NEEDS_NO_DATA and self.format != "none"

    @property
    def observed_calls(self) -> int:
        """Calls to observe before freezing: none for a recipe that chooses without data."""
        return self.calibration_calls if self.needs_data else 0

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from ``torch.compile``'s dict; ``PERMUQUANT_DUMP`` stands in for ``dump``."""
        fields = {field.name for field in dataclasses.fields(cls)}
        given = dict(given or {})
        for name in given:
            if name not in fields:
                raise Refused(
                    f"permuquant: unknown option {name!r}{_nearest(name, tuple(fields))}; "
                    f"known options: {', '.join(sorted(fields))}"
                )
        if given.get("plan") is not None:
            raise Refused(
                "permuquant: loading a plan from disk is not supported yet; leave the option unset"
            )
        given.setdefault("dump", os.environ.get("PERMUQUANT_DUMP") or None)
        if given["dump"] is not None:
            given["dump"] = Path(given["dump"])
        if isinstance(given.get("alpha"), int | float):
            given["alpha"] = (given["alpha"],)
        for name in ("alpha", "skip"):
            if name in given:
                if isinstance(given[name], str):
                    given[name] = (given[name],)
                given[name] = tuple(given[name])
        return cls(**given)


def _nearest(word: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
