"""Which linears are multiplied together: those that read one tensor, as long as their decoded
weights fit into the scratch that the largest weight of the graph needs by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from pq_compile.routes import Route
from pq_compile.scratch import MOST_PARTS

Operands = tuple[fx.Node, fx.Node, fx.Node | None]
DECODED = ("fp8", "half")
"""Kinds that multiply by a scratch, which holds several weights as well as one."""


def operands(node: fx.Node) -> Operands:
    """Input, weight and bias of a linear node, however they were passed."""
    given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False))
    given |= node.kwargs
    return given["input"], given["weight"], given.get("bias")


def size(weight: fx.Node) -> tuple[int, int]:
    n, k = weight.meta["example_value"].shape
    return int(n), int(k)


def readers(
    linears: Mapping[fx.Node, Operands], schemes: Mapping[str, str], route: Route | None
) -> dict[fx.Node, list[fx.Node]]:
    """The tensors that linears of the route's scheme read -> those linears, in order."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, (x, _, _) in linears.items():
        if route is not None and schemes[node.name] == route.scheme:
            found.setdefault(x, []).append(node)
    return found


def teams(
    alike: Sequence[fx.Node], linears: Mapping[fx.Node, Operands], kind: str
) -> list[tuple[fx.Node, ...]]:
    """``alike``, which read one tensor, parted: small ones first, each in the graph's order."""
    most = max(_elements(weight) for _, weight, _ in linears.values())
    found: list[list[fx.Node]] = []
    for node in sorted(alike, key=lambda one: _elements(linears[one][1])):
        if kind in DECODED and found and _joins(node, found[-1], linears, most):
            found[-1].append(node)
        else:
            found.append([node])
    order = {node: i for i, node in enumerate(linears)}
    return [tuple(sorted(team, key=order.__getitem__)) for team in found]


def _joins(
    node: fx.Node, team: Sequence[fx.Node], linears: Mapping[fx.Node, Operands], most: int
) -> bool:
    """Whether there is room, and every bias is known when the first of the team multiplies."""
    biases = [linears[one][2] for one in (*team, node)]
    known = all(bias is not None and bias.op == "placeholder" for bias in biases)
    together = sum(_elements(linears[one][1]) for one in (*team, node))
    return (known or not any(biases)) and len(team) < MOST_PARTS and together <= most


def _elements(weight: fx.Node) -> int:
    n, k = size(weight)
    return n * k
