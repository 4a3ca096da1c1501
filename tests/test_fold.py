"""Folding composes, inverts and names what it moves; constraints of several graphs merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.fold import fold, moved
from passes.propagate import extend, merge, random_orders, rename
from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Orders, Segment
from pq_compile.show import show
from tests.graphs import Traced, relative_error, trace
from tests.test_propagate import traced
from tests.toys import TOYS, Net, linear, tokens

UP, DOWN = Axis("up.weight", 0), Axis("down.weight", 1)


def groups_of(
    segments: dict[Axis, tuple[tuple[int, int], ...]], pinned: dict[int, str] | None = None
) -> Groups:
    """Groups written by hand: axis -> (leaf, size) pairs; one group per leaf."""
    rows = {axis: tuple(Segment(*pair) for pair in row) for axis, row in segments.items()}
    found = []
    for segment in dict.fromkeys(segment for row in rows.values() for segment in row):
        axes = tuple(axis for axis, row in rows.items() if segment in row)
        why = (pinned or {}).get(segment.leaf)
        group = Group(str(axes[0]), (segment.leaf,), segment.size, axes, (why,) if why else ())
        found.append(group)
    return Groups(rows, tuple(found))


def tensors_of(toy: Traced) -> dict[str, torch.Tensor]:
    return {name: toy.inputs[index].detach() for name, index in toy.graph.positions.items()}


def fold_all(toy: Traced, orders: Orders) -> dict[str, torch.Tensor]:
    return {name: fold(name, x, toy.groups, orders) for name, x in tensors_of(toy).items()}


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["adaln_zero", "concatenated_inputs", "group_norm"]), st.integers(0, 99))
def test_folding_twice_is_folding_the_composition(name: str, seed: int) -> None:
    toy = traced(name)
    p, q = random_orders(toy.groups, seed), random_orders(toy.groups, seed + 100)
    both = {leaf: p[leaf].then(q[leaf]) for leaf in p}
    for parameter, x in tensors_of(toy).items():
        once = fold(parameter, x, toy.groups, p)
        twice = fold(parameter, once, toy.groups, q)
        assert torch.equal(twice, fold(parameter, x, toy.groups, both))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["adaln_zero", "concatenated_inputs", "group_norm"]), st.integers(0, 99))
def test_folding_the_inverse_restores_the_parameters(name: str, seed: int) -> None:
    toy = traced(name)
    orders = random_orders(toy.groups, seed)
    back = {leaf: order.inverse() for leaf, order in orders.items()}
    for parameter, x in tensors_of(toy).items():
        folded = fold(parameter, x, toy.groups, orders)
        assert torch.equal(fold(parameter, folded, toy.groups, back), x)


def test_a_parameter_that_does_not_move_is_returned_itself() -> None:
    toy = traced("plain_mlp")
    orders = random_orders(toy.groups, 0)
    tensors = tensors_of(toy)
    assert fold("down.bias", tensors["down.bias"], toy.groups, orders) is tensors["down.bias"]
    identity = {leaf: Permutation.identity(len(order)) for leaf, order in orders.items()}
    assert fold("up.weight", tensors["up.weight"], toy.groups, identity) is tensors["up.weight"]
    assert moved(toy.groups, orders) == ("up.weight", "up.bias", "down.weight")
    assert moved(toy.groups, identity) == ()
    assert fold("unknown", tensors["up.weight"], toy.groups, orders) is tensors["up.weight"]


def test_folding_leaves_the_original_alone_and_keeps_its_dtype() -> None:
    toy = traced("plain_mlp")
    x = tensors_of(toy)["up.weight"].to(torch.bfloat16)
    before = x.clone()
    folded = fold("up.weight", x, toy.groups, random_orders(toy.groups, 0))
    assert torch.equal(x, before)
    assert folded.dtype == torch.bfloat16
    assert not torch.equal(folded, x)


def test_random_orders_are_reproducible_and_cover_every_free_leaf() -> None:
    groups = traced("attention").groups
    orders = random_orders(groups, 3)
    assert orders == random_orders(groups, 3)
    assert orders != random_orders(groups, 4)
    assert set(orders) == {leaf for group in groups.groups if group.free for leaf in group.leaves}


# ---------------------------------------------------------------- several graphs


def test_merging_a_graph_with_itself_changes_nothing() -> None:
    groups = traced("adaln_zero").groups
    assert merge([groups, groups]) == groups
    assert merge([groups]) == groups
    assert merge([]) == Groups({}, ())


def test_merging_cuts_segments_and_adds_pins() -> None:
    whole = groups_of({UP: ((0, 12),), DOWN: ((0, 12),)})
    halves = groups_of({UP: ((5, 4), (6, 8))}, {5: "aten.select"})
    both = merge([whole, halves])
    assert both == merge([whole, merge([halves])])
    assert [segment.size for segment in both.segments[DOWN]] == [4, 8]
    assert both.segments[UP] == both.segments[DOWN]
    assert [group.pinned_by for group in both.groups] == [("aten.select",), ()]


def test_merging_axes_of_different_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"up\.weight\[0\] has different sizes in two graphs"):
        merge([groups_of({UP: ((0, 12),)}), groups_of({UP: ((0, 8),)})])


def test_orders_of_merged_groups_are_invisible_in_both_graphs() -> None:
    up, down, other = linear(8, 12), linear(12, 8), linear(6, 8)
    parts = {"up": up, "down": down, "other": other}

    def whole(m: Any, x: torch.Tensor) -> Any:
        result = m.down(m.up(x).relu())
        return result

    def half(m: Any, x: torch.Tensor) -> Any:
        result = m.other(m.up(x).relu()[..., :6])
        return result

    toys = [trace(Net(run, **parts).double(), tokens().double().fill_(1)) for run in (whole, half)]
    both = merge([toy.groups for toy in toys])
    orders = random_orders(both, 0)
    assert [segment.size for segment in both.segments[DOWN]] == [6, 6]
    for toy in toys:
        expected = toy.run()
        toy.groups = both
        assert relative_error(toy.run(orders), expected) < 1e-12


def test_renaming_changes_names_only() -> None:
    groups = traced("attention").groups
    names = {axis.parameter: f"blocks.3.{axis.parameter}" for axis in groups.segments}
    there = rename(groups, names)
    assert rename(there, {new: old for old, new in names.items()}) == groups
    assert show(there).split() == [
        f"blocks.3.{word}" if "[" in word else word for word in show(groups).split()
    ]


# ---------------------------------------------------------------- orders already in force

ROTATED = Permutation((1, 2, 3, 0))
SWAPPED = Permutation((1, 0, 2, 3))


def test_orders_of_axes_become_orders_of_their_leaves() -> None:
    groups = groups_of({UP: ((0, 4), (1, 4)), DOWN: ((0, 4), (1, 4))})
    order = Permutation.side_by_side([ROTATED, SWAPPED])
    assert extend({UP: order}, groups) == ({0: ROTATED, 1: SWAPPED}, ())
    assert extend({UP: order, DOWN: order}, groups) == ({0: ROTATED, 1: SWAPPED}, ())


def test_axes_that_disagree_keep_their_channels_in_place() -> None:
    groups = groups_of({UP: ((0, 4), (1, 4)), DOWN: ((0, 4), (1, 4))})
    one, other = (Permutation.side_by_side([first, SWAPPED]) for first in (ROTATED, SWAPPED))
    orders, refused = extend({UP: one, DOWN: other}, groups)
    assert orders == {1: SWAPPED}
    assert refused == ("down.weight[1] and up.weight[0] must be ordered alike, but are not",)


def test_an_order_across_a_border_is_refused() -> None:
    groups = groups_of({UP: ((0, 2), (1, 2))})
    orders, refused = extend({UP: ROTATED}, groups)
    assert orders == {}
    assert refused[0] == "up.weight[0] is ordered across the border of its segment of 2 channels"


def test_a_pinned_leaf_is_refused_with_its_culprit_unless_it_does_not_move() -> None:
    groups = groups_of({UP: ((0, 4),)}, {0: "graph output 0"})
    assert extend({UP: ROTATED}, groups) == (
        {},
        ("up.weight[0] is reordered, but pinned by graph output 0",),
    )
    assert extend({UP: Permutation.identity(4)}, groups) == ({}, ())


def test_an_axis_of_another_graph_is_ignored() -> None:
    assert extend({DOWN: ROTATED}, groups_of({UP: ((0, 4),)})) == ({}, ())


def test_extending_the_orders_of_the_same_groups_gives_them_back() -> None:
    from pq_compile.plan import axis_order

    groups = traced("concatenated_inputs").groups
    orders = random_orders(groups, 0)
    axes = {axis: axis_order(axis, groups, orders) for axis in groups.segments}
    again, refused = extend(axes, groups)
    assert refused == ()
    assert again == {leaf: order for leaf, order in orders.items() if not order.is_identity}


def test_the_toys_are_many() -> None:
    assert len(TOYS) >= 30
