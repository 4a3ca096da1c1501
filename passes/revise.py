"""A plan under stricter groups: a graph seen after freezing pinned what the first left free.

Orders are only ever given up, so errors stay those that were measured: before reordering for what
lost its order, as they were for the rest.
"""

from __future__ import annotations

from dataclasses import replace

from pq_compile.plan import Group, Groups, LinearPlan, Orders, Plan, Verdict

from .accept import standing

GIVEN_UP = "given up: a graph seen after freezing does not allow the order"


def revise(plan: Plan, groups: Groups, orders: Orders) -> Plan:
    """``plan`` with the orders still in force, and verdicts and linears that say so."""
    moving = {leaf: order for leaf, order in orders.items() if not order.is_identity}
    old = {verdict.group: verdict for verdict in plan.verdicts}
    return replace(
        plan,
        orders=moving,
        verdicts=tuple(_verdict(group, old.get(group.name), moving) for group in groups.groups),
        linears=tuple(_linear(one, groups, moving) for one in plan.linears),
    )


def _verdict(group: Group, old: Verdict | None, orders: Orders) -> Verdict:
    moves = any(leaf in orders for leaf in group.leaves)
    if old is None:
        reason = "part of an order chosen before" if moves else "first seen after freezing"
        old = Verdict(group.name, moves, None, None, reason)
    if old.accepted and not moves:
        return replace(old, accepted=False, error_after=old.error_before, reason=GIVEN_UP)
    return replace(old, accepted=moves)


def _linear(planned: LinearPlan, groups: Groups, orders: Orders) -> LinearPlan:
    group, free, moves = standing(planned.linear, groups, orders)
    after = planned.error_after if moves else planned.error_before
    return replace(planned, group=group, free=free, accepted=moves, error_after=after)
