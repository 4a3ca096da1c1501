"""What users call beside ``torch.compile``: freeze, refresh, calibration, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .errors import Refused
from .options import Options
from .plan import Plan
from .reporting import Report, Section
from .resolve import parameters_of
from .runtime import HELD
from .unit import OWNERS, Needs, Passes, Unit


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
        unit.freeze()


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

    Left by an exception, the model stays in its own precision and goes on observing.
    """
    tensors = list(parameters_of(model).values())
    for tensor in tensors:
        HELD[tensor] = True
    try:
        yield
    finally:
        for tensor in tensors:
            HELD.pop(tensor, None)  # type: ignore[no-untyped-call]
    freeze(model)


def report(model: Any) -> Report:
    """What was found, decided and done, linear by linear; before freezing, what would be."""
    names = {id(tensor): name for name, tensor in parameters_of(model).items()}
    units = _units(model)
    return Report(tuple(_section(unit, names) for unit in units), units[0].options)


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


def _section(unit: Unit, user_names: dict[int, str]) -> Section:
    tensors = unit.parameters()
    names = {name: user_names.get(id(tensor), name) for name, tensor in tensors.items()}
    needs = unit.needs.renamed(names, unit.passes.rename)
    old = (group.name for group in unit.needs.groups.groups)
    renamed = dict(zip(old, (group.name for group in needs.groups.groups), strict=True))
    plan = unit.plan or dry_plan(unit.passes, unit.needs, unit.options)
    return Section(
        plan=plan.renamed(names, renamed),
        groups=needs.groups,
        phase=_phase(unit),
        scheme=scheme(unit.options),
        calibration_calls=unit.calls,
        weight_bytes_before=sum(tensor.nbytes for tensor in tensors.values()),
        weight_bytes_after=unit.bytes_served(),
        seconds=unit.seconds,
        warnings=unit.notes,
    )


def scheme(options: Options) -> str:
    """What "auto" stands for."""
    return "w4a4" if options.scheme == "auto" else options.scheme


def dry_plan(passes: Passes, needs: Needs, options: Options) -> Plan:
    """What freezing would do with every linear, no order judged."""
    rtn = replace(options, recipe="rtn")
    plan = passes.plan(needs.groups, needs.linears, needs.kept, {}, {}, rtn)
    return replace(plan, recipe=options.recipe, verdicts=())


def _phase(unit: Unit) -> str:
    if unit.frozen:
        return "serving"
    if unit.failure is not None:
        return f"own precision, for freezing failed: {unit.failure}"
    return f"observing {unit.calls} of {unit.options.observed_calls}"
