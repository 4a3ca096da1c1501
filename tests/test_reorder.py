"""Scores and the orders they give, worked by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passes.reorder import candidates, readers, scores
from pq_compile.permutation import Permutation
from pq_compile.plan import Axis, Group, Groups, Linear, Segment, Statistics


def linear(name: str, k: int, n: int = 2) -> Linear:
    return Linear(name, f"{name}.weight", None, k, n, rows=8, per_sample=False)


def statistics(moments: list[float]) -> Statistics:
    moment = torch.tensor(moments, dtype=torch.float64)
    rows = torch.zeros(1, len(moments))
    return Statistics(moment, 1, rows, rows, "none")


def grouped(axes: dict[str, list[tuple[int, int]]], leaves: tuple[int, ...] = (0,)) -> Groups:
    """One group of ``leaves``; every other leaf is a pinned group of its own."""
    segments = {
        Axis(f"{name}.weight", 1): tuple(Segment(*each) for each in row)
        for name, row in axes.items()
    }
    sizes = {segment.leaf: segment.size for row in segments.values() for segment in row}
    free = Group("g", leaves, sizes[leaves[0]], tuple(segments))
    pinned = [
        Group(f"p{leaf}", (leaf,), size, (), ("graph input x",))
        for leaf, size in sizes.items()
        if leaf not in leaves
    ]
    return Groups(segments, (free, *pinned))


def weight(squares: list[float]) -> Tensor:
    """[1, K] with these squares."""
    return torch.tensor([squares], dtype=torch.float64).sqrt()


def test_readers_are_the_linears_whose_input_holds_a_leaf() -> None:
    groups = grouped({"a": [(0, 4)], "b": [(1, 2), (0, 4)], "c": [(1, 2)]})
    a, b, c, d = linear("a", 4), linear("b", 6), linear("c", 2), linear("d", 4)
    assert readers(groups, [a, b, c, d, a]) == {"g": (a, b), "p1": (b, c)}


def test_a_score_is_a_weighted_geometric_mean_of_second_moments() -> None:
    groups = grouped({"a": [(0, 2)]})
    stats = {"a.weight": statistics([4.0, 12.0])}  # over the mean: 1/2, 3/2
    weights = {"a.weight": torch.tensor([[3.0, 1.0], [3.0, 1.0]])}  # 9, 1: 9/5, 1/5
    for alpha, expected in ((1.0, [0.5, 1.5]), (0.0, [1.8, 0.2]), (0.5, [0.9**0.5, 0.3**0.5])):
        found = scores(groups.groups[0], groups, [linear("a", 2)], stats, weights, alpha)
        torch.testing.assert_close(
            found[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_readers_count_alike_whatever_their_magnitude() -> None:
    groups = grouped({"a": [(0, 2)], "b": [(0, 2)]})
    stats = {"a.weight": statistics([1.0, 3.0]), "b.weight": statistics([3e6, 1e6])}
    weights = {"a.weight": torch.ones(1, 2), "b.weight": torch.ones(1, 2)}
    linears = [linear("a", 2), linear("b", 2)]
    found = scores(groups.groups[0], groups, linears, stats, weights, 1.0)
    assert found[0].tolist() == [1.0, 1.0]


def test_a_leaf_in_several_places_sums_their_moments() -> None:
    groups = grouped({"a": [(0, 2), (1, 2), (0, 2)]})
    stats = {"a.weight": statistics([1.0, 2.0, 9.0, 9.0, 5.0, 4.0])}  # mean 5
    weights = {"a.weight": torch.ones(1, 6)}
    found = scores(groups.groups[0], groups, [linear("a", 6)], stats, weights, 1.0)
    torch.testing.assert_close(found[0], torch.tensor([1.2, 1.2]).double(), rtol=1e-7, atol=0)
    assert list(found) == [0]


def test_sorting_stays_inside_heads() -> None:
    groups = grouped({"a": [(0, 3), (1, 3), (2, 2)]}, leaves=(0, 1))
    stats = {"a.weight": statistics([1.0, 9.0, 4.0, 5.0, 2.0, 7.0, 100.0, 3.0])}
    weights = {"a.weight": torch.ones(1, 8)}
    found = candidates(groups.groups[0], groups, [linear("a", 8)], stats, weights, (1.0,))
    assert found == {1.0: {0: Permutation((1, 2, 0)), 1: Permutation((2, 0, 1))}}


def test_each_alpha_sorts_by_its_own_mixture() -> None:
    groups = grouped({"a": [(0, 3)]})
    stats = {"a.weight": statistics([1.0, 2.0, 3.0])}
    weights = {"a.weight": weight([5.0, 4.0, 1.0])}
    found = candidates(groups.groups[0], groups, [linear("a", 3)], stats, weights, (0.0, 0.5, 1.0))
    assert [orders[0].order for orders in found.values()] == [(0, 1, 2), (1, 0, 2), (2, 1, 0)]


def test_channels_that_never_fire_come_last_and_ties_stay() -> None:
    groups = grouped({"a": [(0, 5)]})
    stats = {"a.weight": statistics([0.0, 2.0, 0.0, 2.0, 2.0])}
    weights = {"a.weight": torch.ones(1, 5)}
    found = candidates(groups.groups[0], groups, [linear("a", 5)], stats, weights, (0.5, 1.0))
    assert {orders[0].order for orders in found.values()} == {(1, 3, 4, 0, 2)}


def test_an_order_of_many_ties_is_the_one_they_stand_in() -> None:
    groups = grouped({"a": [(0, 500)]})
    stats, weights = {"a.weight": statistics([1.0] * 500)}, {"a.weight": torch.ones(1, 500)}
    found = candidates(groups.groups[0], groups, [linear("a", 500)], stats, weights, (0.5,))
    assert found[0.5][0].is_identity


def test_an_input_that_is_always_zero_leaves_the_order_alone() -> None:
    groups = grouped({"a": [(0, 3)]})
    stats = {"a.weight": statistics([0.0, 0.0, 0.0])}
    weights = {"a.weight": weight([1.0, 2.0, 3.0])}
    found = candidates(groups.groups[0], groups, [linear("a", 3)], stats, weights, (1.0,))
    assert found[1.0][0].is_identity


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_they_are_given_in(
    moments: list[int], random: object
) -> None:
    """Sorting permuted channels sorts the same values."""
    size = len(moments)
    order = Permutation.random(size, torch.Generator().manual_seed(sum(moments)))
    groups = grouped({"a": [(0, size)]})
    moment = torch.tensor(moments, dtype=torch.float64)
    sorted_values = []
    for values in (moment, order.apply(moment, 0)):
        stats = {"a.weight": statistics(values.tolist())}
        weights = {"a.weight": torch.ones(1, size)}
        group, reader = groups.groups[0], [linear("a", size)]
        (found,) = candidates(group, groups, reader, stats, weights, (1.0,)).values()
        sorted_values.append(found[0].apply(values, 0).tolist())
    assert sorted_values[0] == sorted_values[1] == sorted(moment.tolist(), reverse=True)
