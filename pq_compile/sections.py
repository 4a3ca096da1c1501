"""A unit as a section of the report: what it found, decided and serves, in the user's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from .needs import Needs
from .options import Options
from .plan import LinearPlan, Plan
from .reporting import Section
from .routes import choose, here, settle_for
from .unit import Passes, Unit


def section(unit: Unit, user_names: Mapping[int, str]) -> Section:
    """The unit as it is now; ``user_names`` are the names in the user's model, by id of tensor."""
    tensors = unit.parameters()
    known = {name: user_names[id(t)] for name, t in tensors.items() if id(t) in user_names}
    taken = set(known.values())
    other = {name: f"another model's {name}" for name in tensors if name in taken}
    names = {name: known.get(name, other.get(name, name)) for name in tensors}
    needs = unit.needs.renamed(names, unit.passes.rename)
    old = (group.name for group in unit.needs.groups.groups)
    renamed = dict(zip(old, (group.name for group in needs.groups.groups), strict=True))
    options = settle_for(unit.options, unit.needs.linears, unit.parameters())
    plan = unit.plan or dry_plan(unit.passes, unit.needs, options)
    plan = plan.renamed(names, renamed)
    tensors = {names[name]: tensor for name, tensor in tensors.items()}
    memory = unit.memory()
    return Section(
        plan=plan,
        groups=needs.groups,
        phase=_phase(unit),
        scheme=scheme(options),
        calibration_calls=unit.calls,
        weight_bytes_before=sum(tensor.nbytes for tensor in tensors.values()),
        weight_bytes_after=sum(memory.values()),
        seconds=unit.seconds,
        memory=memory,
        kernels={one.linear.name: kernel_of(one, tensors, options) for one in plan.linears},
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


def kernel_of(one: LinearPlan, tensors: Mapping[str, Tensor], options: Options) -> str:
    """The code that multiplies this linear on its device."""
    weight = tensors.get(one.linear.weight)
    if one.route == "keep" or weight is None:
        return "own precision"
    place = here(weight.device, options.format, weight.dtype, one.linear.rows)
    return choose(one.route, place, options.route).kind
