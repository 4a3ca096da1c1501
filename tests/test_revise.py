"""A plan that lost an order says so, and keeps what it did not lose."""

from __future__ import annotations

from passes.revise import GIVEN_UP, revise
from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Linear, LinearPlan, Plan, Segment, Verdict

SWAP = Permutation((1, 0))
DOWN, OUT = Axis("down.weight", 1), Axis("out.weight", 1)


def linear(name: str) -> LinearPlan:
    one = Linear(name, f"{name}.weight", None, 2, 2, 1, False)
    return LinearPlan(one, "w4a4", "", f"{name}.weight[1]", True, True, 0.5, 0.25)


def test_what_a_later_graph_pins_is_given_up_and_the_rest_stays() -> None:
    plan = Plan(
        "permuquant",
        "nvfp4",
        (linear("down"), linear("out")),
        {0: SWAP, 1: SWAP},
        tuple(Verdict(str(axis), True, 0.5, 0.25, "pays") for axis in (DOWN, OUT)),
    )
    stricter = Groups(
        {DOWN: (Segment(4, 2),), OUT: (Segment(5, 2),)},
        (
            Group(str(DOWN), (4,), 2, (DOWN,), ("graph input extra",)),
            Group(str(OUT), (5,), 2, (OUT,)),
        ),
    )
    revised = revise(plan, stricter, {4: Permutation.identity(2), 5: SWAP})
    assert revised.orders == {5: SWAP}
    down, out = revised.linears
    assert (down.free, down.accepted, down.error_after) == (False, False, 0.5)
    assert (out.free, out.accepted, out.error_after) == (True, True, 0.25)
    assert [(v.accepted, v.reason) for v in revised.verdicts] == [(False, GIVEN_UP), (True, "pays")]


def test_groups_that_the_plan_never_saw_get_a_verdict() -> None:
    late = Axis("late.weight", 0)
    groups = Groups({late: (Segment(0, 2),)}, (Group(str(late), (0,), 2, (late,)),))
    plan = Plan("rtn", "nvfp4", ())
    assert revise(plan, groups, {}).verdicts[0].reason == "first seen after freezing"
    assert revise(plan, groups, {0: SWAP}).verdicts[0].accepted
