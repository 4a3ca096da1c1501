"""A sort: channels that matter alike share a group, and with it a scale.

Channel ``i`` of an axis scores ``mu2_a[i]**alpha * mu2_w[i]**(1 - alpha)``, the second moments of
the activations and of the weights that meet in it; descending, each leaf within itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pq_compile.permutation import Permutation
from pq_compile.plan import Group, Groups, Linear, Orders, Statistics

from .calibrate import sums_of_squares

Moments = dict[int, tuple[Tensor, Tensor]]
"""leaf -> fp64 [size]: second moments of activations, and of weights."""


def one_per_weight(linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """The first linear of every weight."""
    first = {linear.weight: linear for linear in reversed(linears)}
    return tuple(first[weight] for weight in dict.fromkeys(linear.weight for linear in linears))


def readers(groups: Groups, linears: Sequence[Linear]) -> dict[str, tuple[Linear, ...]]:
    """Group -> the linears whose input axis holds a leaf of it; one per weight."""
    unique = one_per_weight(linears)
    leaves = {
        linear.weight: {segment.leaf for segment in groups.segments.get(linear.input_axis, ())}
        for linear in unique
    }
    return {
        group.name: tuple(
            linear for linear in unique if not leaves[linear.weight].isdisjoint(group.leaves)
        )
        for group in groups.groups
    }


def scores(
    group: Group,
    groups: Groups,
    linears: Sequence[Linear],
    stats: Mapping[str, Statistics],
    weights: Mapping[str, Tensor],
    alpha: float,
) -> dict[int, Tensor]:
    """Leaf -> fp64 [size] on the CPU, over the linears of ``linears`` that read the group.

    Each reader's moments are divided by their mean over its whole input axis, so that readers
    count alike whatever their magnitude, and averaged. Where a leaf stands several times on an
    axis, its channels' moments are summed over the places.
    """
    moments = _moments(group, groups, linears, stats, weights)
    return _scored(moments, alpha)


def candidates(
    group: Group,
    groups: Groups,
    linears: Sequence[Linear],
    stats: Mapping[str, Statistics],
    weights: Mapping[str, Tensor],
    alphas: Sequence[float],
) -> dict[float, Orders]:
    """Alpha -> the order of every leaf that is read: scores descending, ties as they stood."""
    moments = _moments(group, groups, linears, stats, weights)
    return {alpha: _sorts(_scored(moments, alpha)) for alpha in alphas}


def _sorts(scored: Mapping[int, Tensor]) -> Orders:
    if not scored:
        return {}
    sorts = torch.stack(list(scored.values())).argsort(dim=1, descending=True, stable=True)
    return {leaf: Permutation.of(sort) for leaf, sort in zip(scored, sorts, strict=True)}


def _scored(moments: Moments, alpha: float) -> dict[int, Tensor]:
    return {leaf: a**alpha * w ** (1 - alpha) for leaf, (a, w) in moments.items()}


def _moments(
    group: Group,
    groups: Groups,
    linears: Sequence[Linear],
    stats: Mapping[str, Statistics],
    weights: Mapping[str, Tensor],
) -> Moments:
    parts: dict[int, list[Tensor]] = {}
    for linear in readers(groups, linears)[group.name]:
        both = torch.stack(
            [
                _over_mean(stats[linear.weight].second_moment.cpu().double()),
                _over_mean(sums_of_squares(weights[linear.weight].detach()).cpu()),
            ]
        )
        for leaf, places in _places(linear, groups, group).items():
            part = torch.stack([both[:, start : start + group.size] for start in places]).sum(0)
            parts.setdefault(leaf, []).append(part)
    means = {leaf: torch.stack(parts[leaf]).mean(0) for leaf in group.leaves if leaf in parts}
    return {leaf: (mean[0], mean[1]) for leaf, mean in means.items()}


def _places(linear: Linear, groups: Groups, group: Group) -> dict[int, list[int]]:
    """Leaf of the group -> where its segments start on the linear's input axis."""
    places: dict[int, list[int]] = {}
    start = 0
    for leaf, size in groups.segments[linear.input_axis]:
        if leaf in group.leaves:
            places.setdefault(leaf, []).append(start)
        start += size
    return places


def _over_mean(moments: Tensor) -> Tensor:
    mean = moments.mean()
    return moments / mean if mean > 0 else moments
