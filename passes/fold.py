"""Reorder parameters: ``W2 f(W1 x) = (W2 Pᵀ) f(P W1 x)``, a permutation that storage absorbs."""

from __future__ import annotations

from torch import Tensor

from pq_compile.plan import Axis, Groups, Orders, axis_order


def fold(parameter_name: str, tensor: Tensor, groups: Groups, orders: Orders) -> Tensor:
    """``tensor`` with every axis in its order: a copy, or the tensor itself if none of them moves.

    Same shape and dtype; a parameter that ``groups`` does not know is returned as it is.
    """
    for dim in range(tensor.ndim):
        axis = Axis(parameter_name, dim)
        if not _moves(axis, groups, orders):
            continue
        order = axis_order(axis, groups, orders)
        if not order.is_identity:
            tensor = order.apply(tensor, dim)
    return tensor


def moved(groups: Groups, orders: Orders) -> tuple[str, ...]:
    """Names of the parameters that some order moves."""
    names = {
        axis.parameter: None
        for axis in groups.segments
        if _moves(axis, groups, orders) and not axis_order(axis, groups, orders).is_identity
    }
    return tuple(names)


def _moves(axis: Axis, groups: Groups, orders: Orders) -> bool:
    return any(segment.leaf in orders for segment in groups.segments.get(axis, ()))
