"""The error that orders are judged by.

``||X W' - Q(X) Q(W)'||^2 / ||X W'||^2`` of a linear's output, the channels of X and W in the order
in question. The exact output is the same in every order: ``(X P') (W P')' = X W'``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pq_compile.formats import Format
from pq_compile.plan import Groups, Linear, Orders, Statistics

OUTPUTS = 512
"""Output channels of a weight that errors are taken over, evenly spaced."""


@dataclass(frozen=True)
class Evidence:
    """What judging needs: the quantised linears, their routes, what they read and hold."""

    groups: Groups
    format: Format | None
    routes: Mapping[str, str]  # of each weight
    stats: Mapping[str, Statistics]
    weights: Mapping[str, Tensor]

    def can_judge(self, linear: Linear) -> bool:
        weight = self.weights.get(linear.weight)
        return (
            self.format is not None
            and self.routes[linear.weight] != "keep"
            and linear.weight in self.stats
            and weight is not None
            and not weight.is_meta
        )

    def errors(self, linear: Linear, side: str, orders: Sequence[Orders]) -> list[float]:
        """The error of one linear under each of ``orders``, on its "fit" or "held_out" rows."""
        assert self.format is not None
        return output_errors(
            getattr(self.stats[linear.weight], side),
            self.weights[linear.weight].detach(),
            [self.order(linear, each) for each in orders],
            self.format,
            quantise_rows=self.routes[linear.weight] == "w4a4",
        )

    def order(self, linear: Linear, orders: Orders) -> Tensor | None:
        """Of its input channels, int64 [K] on the CPU; None where none of them moves."""
        segments = self.groups.segments.get(linear.input_axis, ())
        if not any(segment.leaf in orders for segment in segments):
            return None
        channels, start = np.empty(linear.in_features, np.int64), 0
        for leaf, size in segments:
            order = orders[leaf].order if leaf in orders else range(size)
            channels[start : start + size] = np.fromiter(order, np.int64, size) + start
            start += size
        return torch.from_numpy(channels)


def output_errors(
    rows: Tensor,
    weight: Tensor,
    orders: Sequence[Tensor | None],
    format: Format,
    *,
    quantise_rows: bool,
) -> list[float]:
    """The error under each order of ``rows`` [R, K] through ``weight`` [N, K].

    An order is int64 [K], the channel that each position holds, or None: as it stands. In fp32,
    or in fp64 if both operands are; on the weight's device, which is waited for once; over at most
    ``OUTPUTS`` evenly spaced output channels; tensor scales are those of the operands given.
    Operands whose output is exactly zero have the error 0.
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, weight.dtype), torch.float32)
    if len(weight) > OUTPUTS:
        chosen = torch.arange(OUTPUTS, device=weight.device) * len(weight) // OUTPUTS
        weight = weight.index_select(0, chosen)
    weight = weight.to(dtype)
    rows = rows.to(weight.device, non_blocking=True).to(dtype)
    exact = rows @ weight.T

    def energy(order: Tensor | None) -> Tensor:
        """Of what is lost."""
        x, w = rows, weight
        if order is not None:
            order = order.to(weight.device, non_blocking=True)
            x, w = x.index_select(1, order), w.index_select(1, order)
        x = format.fake(format.pad(x)) if quantise_rows else format.pad(x)
        return (x @ format.fake(format.pad(w)).T).sub_(exact).double().square().sum()

    power = exact.double().square().sum()
    total, *lost = torch.stack([power, *map(energy, orders)]).tolist()
    return [each / total if total else 0.0 for each in lost]
