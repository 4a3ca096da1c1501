"""What users call beside ``torch.compile``: freeze, refresh, calibration, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import progress
from .errors import Refused
from .reporting import Report
from .resolve import parameters_of
from .runtime import HELD
from .sections import section
from .unit import OWNERS, Unit


def freeze(model: Any) -> None:
    """End observation now: make the plan from what was seen, fold and pack.

    ``model`` may be the compiled model, the module itself, or a function that uses it. Raises
    ``Refused`` before any call, or if nothing can be quantised.
    """
    for unit in _units(model):
        if not unit.frozen and unit.calls == 0 and unit.options.observed_calls > 0:
            raise Refused(
                "permuquant: nothing was observed yet; call the compiled model at least once "
                "before freeze (a few prompts over the whole schedule choose best)"
            )
    reasons = [unit.nothing_to_quantise() for unit in _units(model)]
    if reasons[0] is not None and all(reasons):
        raise Refused(reasons[0])
    for unit in _units(model):
        try:
            unit.freeze()
        finally:
            progress.done(unit)


def refresh(model: Any) -> None:
    """Fold and pack again at the next call, in the same order, from the weights as they are now.

    Needed after ``parameter.data.add_(...)`` on a weight that was kept, the one write that cannot
    be seen; harmless at any other time.
    """
    for unit in _units(model):
        unit.refresh()


@contextmanager
def calibration(model: Any) -> Iterator[None]:
    """Observe every call made inside, however many, and freeze at the end.

    Inside another calibration of the same model it adds nothing: the outer one ends it. Left by an
    exception, the model stays in its own precision and goes on observing. Raises ``Refused`` for a
    model that is frozen.
    """
    tensors = list(parameters_of(model).values())
    if any(OWNERS[tensor][0].frozen for tensor in tensors if tensor in OWNERS):
        raise Refused(
            "permuquant: this model is frozen already, and nothing would be observed; put all "
            "calls into one calibration, or compile a copy of the model to choose anew"
        )
    for tensor in tensors:
        HELD[tensor] = HELD[tensor] + 1 if tensor in HELD else 1
    try:
        yield
    finally:
        for tensor in tensors:
            HELD[tensor] -= 1
    if not any(HELD[tensor] for tensor in tensors):
        freeze(model)


def report(model: Any) -> Report:
    """What was found, decided and done, linear by linear; before freezing, what would be."""
    names = {id(tensor): name for name, tensor in parameters_of(model).items()}
    units = _units(model)
    return Report(tuple(section(unit, names) for unit in units), units[0].options)


def _units(model: Any) -> list[Unit]:
    """The units of the model's parameters, in their order in the model."""
    tensors = parameters_of(model).values()
    units = list(dict.fromkeys(OWNERS[tensor][0] for tensor in tensors if tensor in OWNERS))
    if not units:
        raise Refused(
            "permuquant: nothing was observed yet; compile the model with "
            'torch.compile(model, backend="permuquant") and call it at least once (a bare '
            "nn.Linear compiled in place never reaches a backend)"
        )
    return units
