"""The values that flow between the passes. All frozen; none holds a tensor of the model.

An *axis* is one dimension of one parameter. Its channels are a row of *segments*; a segment is
ordered by the permutation of its *leaf*, so every axis that holds the same leaf moves together. A
*group* gathers the leaves that occur on the same axes (the 24 heads of one attention; the one
residual stream) and is accepted or refused as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from .permutation import Permutation


class Axis(NamedTuple):
    """One dimension of one parameter or buffer, by its name in the user's model."""

    parameter: str
    dim: int

    def __str__(self) -> str:
        return f"{self.parameter}[{self.dim}]"


class Segment(NamedTuple):
    """``size`` neighbouring channels of an axis, ordered by the permutation of ``leaf``."""

    leaf: int
    size: int


@dataclass(frozen=True)
class Group:
    """Leaves of one size on the same axes, permuted each within itself by one decision."""

    name: str  # its first axis, "blocks.0.attn.to_v.weight[0]"; "...#1" where groups share it
    leaves: tuple[int, ...]
    size: int  # channels of each leaf
    axes: tuple[Axis, ...]
    pinned_by: tuple[str, ...] = ()  # one sentence per reason; empty: free

    @property
    def free(self) -> bool:
        return not self.pinned_by

    @property
    def structure(self) -> str:
        return f"{self.size}" if len(self.leaves) == 1 else f"{len(self.leaves)} x {self.size}"


@dataclass(frozen=True)
class Groups:
    """All that ``propagate`` found: the segments of every parameter axis, and their groups."""

    segments: Mapping[Axis, tuple[Segment, ...]]
    groups: tuple[Group, ...]

    @cached_property
    def owners(self) -> Mapping[int, Group]:
        """Leaf -> its group."""
        return {leaf: group for group in self.groups for leaf in group.leaves}


@dataclass(frozen=True)
class Linear:
    """One linear of the captured graph, ``y = x @ weight.T + bias``."""

    name: str  # module path, "transformer_blocks.0.attn.to_q"
    weight: str  # parameter name
    bias: str | None
    in_features: int
    out_features: int
    rows: int  # rows of x when captured: batch times tokens
    per_sample: bool  # x has one row per sample (modulation): M is the batch size
    reads: str = ""  # name of the node it reads; linears with equal names read one tensor

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.in_features * self.out_features

    @property
    def input_axis(self) -> Axis:
        return Axis(self.weight, 1)

    def renamed(self, names: Mapping[str, str]) -> Linear:
        """The same linear under other parameter names; a name that ``names`` lacks stays."""
        weight = names.get(self.weight, self.weight)
        bias = None if self.bias is None else names.get(self.bias, self.bias)
        return replace(self, name=weight.removesuffix(".weight"), weight=weight, bias=bias)

    @property
    def in_block(self) -> bool:
        """Belongs to a repeated block: a component of its path is an index."""
        return any(part.isdigit() for part in self.name.split("."))


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one linear's input."""

    second_moment: Tensor  # fp64 [K], mean of x**2 per input channel over every row seen
    rows: int  # rows seen
    fit: Tensor  # [R, K] rows to choose by, in the model's dtype, on the CPU
    held_out: Tensor  # [R', K] rows of other runs, to judge by
    held_out_by: Literal["run", "call", "none"]  # what separates held_out from fit


Orders = Mapping[int, Permutation]
"""leaf -> its permutation; a leaf that is absent keeps its order."""


@dataclass(frozen=True)
class Verdict:
    """What became of one group.

    Errors are means, over the linears that read it, of their relative squared output errors.
    """

    group: str
    accepted: bool
    error_before: float | None
    error_after: float | None  # of the best candidate, accepted or not
    reason: str
    alpha: float | None = None


@dataclass(frozen=True)
class LinearPlan:
    """What is done with one linear, and why."""

    linear: Linear
    route: str  # "w4a4", "w4a16", or "keep"
    reason: str  # why this route; for a kept linear, why it was not quantised
    group: str | None = None
    free: bool = False
    accepted: bool = False
    error_before: float | None = None
    error_after: float | None = None
    bits_per_weight: float | None = None


@dataclass(frozen=True)
class Plan:
    """The only thing later stages learn from earlier ones."""

    recipe: str
    format: str
    linears: tuple[LinearPlan, ...]
    orders: Orders = field(default_factory=dict)  # accepted permutations only
    verdicts: tuple[Verdict, ...] = ()

    def renamed(self, parameters: Mapping[str, str], groups: Mapping[str, str]) -> Plan:
        """The same plan under other names; a name that the mappings lack stays."""
        linears = tuple(
            replace(
                one,
                linear=one.linear.renamed(parameters),
                group=None if one.group is None else groups.get(one.group, one.group),
            )
            for one in self.linears
        )
        verdicts = tuple(replace(v, group=groups.get(v.group, v.group)) for v in self.verdicts)
        return replace(self, linears=linears, verdicts=verdicts)


def axis_order(axis: Axis, groups: Groups, orders: Orders) -> Permutation:
    """The whole permutation of one axis, its segments side by side."""
    return Permutation.side_by_side(
        [
            orders.get(segment.leaf) or Permutation.identity(segment.size)
            for segment in groups.segments[axis]
        ]
    )
