"""An order is kept only if it pays on rows that it was not chosen by.

Every free group tries a sort for each alpha against the order as it stands; the best one on the
rows to fit to is accepted if its gain on the rows held out, (before - after) / before, is above
tau. Errors are those of ``judge``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from pq_compile.formats import FORMATS
from pq_compile.options import Options
from pq_compile.permutation import Permutation
from pq_compile.plan import (
    Group,
    Groups,
    Linear,
    LinearPlan,
    Orders,
    Plan,
    Statistics,
    Verdict,
)
from pq_compile.routes import settle_for

from .judge import Evidence
from .policy import route_of
from .reorder import candidates, one_per_weight, readers

Decision = tuple[Verdict, Orders]


def accept(
    groups: Groups,
    linears: Sequence[Linear],
    kept: Mapping[str, str],
    stats: Mapping[str, Statistics],
    weights: Mapping[str, Tensor],
    options: Options,
) -> Plan:
    """The whole plan: a route for every linear, a verdict for every group.

    ``kept``: why a linear cannot be quantised, by the name of its weight (or its own). ``stats``
    and ``weights`` [N, K] by name of weight; errors are None where either is missing or meta.
    Groups are decided in order, each with the orders accepted before it in force.
    """
    unique = one_per_weight(linears)
    options = settle_for(options, unique, weights)
    routes = {linear.weight: route_of(linear, options, kept) for linear in unique}
    evidence = Evidence(
        groups,
        FORMATS.get(options.format),
        {weight: route for weight, (route, _) in routes.items()},
        stats,
        weights,
    )
    orders, verdicts = _decide(evidence, unique, options)
    return Plan(
        recipe=options.recipe,
        format=options.format,
        linears=tuple(
            _linear_plan(linear, routes[linear.weight], evidence, orders) for linear in unique
        ),
        orders=orders,
        verdicts=verdicts,
    )


def _decide(
    evidence: Evidence, linears: Sequence[Linear], options: Options
) -> tuple[Orders, tuple[Verdict, ...]]:
    """The accepted orders, and a verdict for each group in the order of the groups."""
    quantised = [linear for linear in linears if evidence.routes[linear.weight] != "keep"]
    read_by = readers(evidence.groups, quantised)
    draw = torch.Generator().manual_seed(options.seed)
    orders: dict[int, Permutation] = {}
    verdicts: list[Verdict] = []
    for group in evidence.groups.groups:
        verdict, order = _decide_one(group, read_by[group.name], evidence, orders, options, draw)
        verdicts.append(verdict)
        if verdict.accepted:
            orders |= order
    return orders, tuple(verdicts)


def _decide_one(
    group: Group,
    linears: Sequence[Linear],
    evidence: Evidence,
    orders: Orders,
    options: Options,
    draw: torch.Generator,
) -> Decision:
    """``linears``: the quantised ones that read the group; ``orders``: accepted before it."""
    if not group.free:
        return _refused(group, f"pinned by {'; '.join(group.pinned_by)}")
    if options.recipe == "rtn":
        return _refused(group, "recipe rtn keeps the order")
    if options.recipe == "random":
        return _random(group, linears, evidence, orders, draw)
    if not linears:
        return _refused(group, "no quantised linear reads it")
    blind = [linear.name for linear in linears if not evidence.can_judge(linear)]
    if blind:
        return _refused(group, f"no calibration data for {blind[0]}")
    return _sorted(group, linears, evidence, orders, options)


def _random(
    group: Group,
    linears: Sequence[Linear],
    evidence: Evidence,
    orders: Orders,
    draw: torch.Generator,
) -> Decision:
    order = {leaf: Permutation.random(group.size, draw) for leaf in group.leaves}
    reason = "recipe random takes any order"
    if not linears or not all(evidence.can_judge(linear) for linear in linears):
        return Verdict(group.name, True, None, None, reason), order
    before, after = _means(evidence, linears, "held_out", [orders, {**orders, **order}])
    return Verdict(group.name, True, before, after, reason), order


def _sorted(
    group: Group,
    linears: Sequence[Linear],
    evidence: Evidence,
    orders: Orders,
    options: Options,
) -> Decision:
    """The best alpha on the rows to fit to; accepted if it also pays on those held out."""
    sorts = candidates(
        group, evidence.groups, linears, evidence.stats, evidence.weights, options.alpha
    )
    trials = [orders, *({**orders, **order} for order in sorts.values())]
    fitted, *tried = _means(evidence, linears, "fit", trials)
    best = min(range(len(tried)), key=tried.__getitem__)
    alpha = list(sorts)[best]
    before, after = _means(evidence, linears, "held_out", [orders, trials[best + 1]])
    pays, reason = _pays(alpha, _gain(fitted, tried[best]), _gain(before, after), options.tau)
    return Verdict(group.name, pays, before, after, reason, alpha), sorts[alpha]


def _pays(alpha: float, fitted: float, held_out: float, tau: float) -> tuple[bool, str]:
    if not isfinite(fitted) or not isfinite(held_out):
        return False, "its readers' errors are not finite"
    if fitted <= 0:
        best = f"the best, alpha {alpha:g}, raises it by {abs(fitted):.1%}"
        return False, f"no sort lowers the error on the rows to fit to; {best}"
    if held_out <= tau:
        return False, f"gain {held_out:.1%} is not above tau {tau:.1%}"
    return True, f"alpha {alpha:g} gains {held_out:.1%} on held-out rows"


def _gain(before: float, after: float) -> float:
    """The relative one; 0 where there was no error to lose."""
    return (before - after) / before if before else 0.0


def _means(
    evidence: Evidence, linears: Sequence[Linear], side: str, orders: Sequence[Orders]
) -> list[float]:
    """Under each of ``orders``, the mean error of the linears."""
    errors = [evidence.errors(linear, side, orders) for linear in linears]
    return [sum(each) / len(linears) for each in zip(*errors, strict=True)]


def _refused(group: Group, reason: str) -> Decision:
    return Verdict(group.name, False, None, None, reason), {}


def _linear_plan(
    linear: Linear,
    route: tuple[str, str],
    evidence: Evidence,
    orders: Orders,
) -> LinearPlan:
    group, free, moves = standing(linear, evidence.groups, orders)
    before = after = None
    if evidence.can_judge(linear):
        before, *moved = evidence.errors(linear, "held_out", [{}, orders] if moves else [{}])
        after = moved[0] if moved else before
    return LinearPlan(
        linear=linear,
        route=route[0],
        reason=route[1],
        group=group,
        free=free,
        accepted=moves,
        error_before=before,
        error_after=after,
        bits_per_weight=_bits(linear, route[0], evidence),
    )


def standing(linear: Linear, groups: Groups, orders: Orders) -> tuple[str | None, bool, bool]:
    """Of its input axis: the first group, whether all are free, whether an order moves it."""
    leaves = [segment.leaf for segment in groups.segments.get(linear.input_axis, ())]
    mine = [groups.owners.get(leaf) for leaf in leaves]
    name = next((group.name for group in mine if group), None)
    free = bool(mine) and all(group is not None and group.free for group in mine)
    return name, free, any(leaf in orders for leaf in leaves)


def _bits(linear: Linear, route: str, evidence: Evidence) -> float | None:
    if route != "keep" and evidence.format is not None:
        return evidence.format.bits_per_weight(linear.out_features, linear.in_features)
    weight = evidence.weights.get(linear.weight)
    return None if weight is None else 8.0 * weight.element_size()
