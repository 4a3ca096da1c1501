"""Lower a model's graph by one route or another, and run it with the packed weights it wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.capture import Graph, capture
from passes.fold import fold
from passes.lower import Lowered, lower
from passes.propagate import propagate, random_orders
from passes.simplify import simplify
from pq_compile import ops
from pq_compile.formats import NVFP4
from pq_compile.routes import TABLE, Route

assert ops.SCHEMES

ROUTES = {(row.scheme, row.name): row for row in TABLE}
OPERATORS = ("linear", "rows", "matmul", "site")
FUSED = tuple(key for key, row in ROUTES.items() if row.target)


@dataclass
class Captured:
    """A graph as the backend analyses it, with the real inputs of the call that brought it."""

    graph: Graph
    inputs: tuple[Any, ...]

    def schemes(self, scheme: str) -> dict[str, str]:
        """Node -> scheme: of every linear, as the policy would without its exceptions."""
        by_name = {one.name: "w4a16" if one.per_sample else scheme for one in self.graph.linears}
        return {node: by_name[name] for node, name in self.graph.nodes.items()}

    def lowered(self, scheme: str, route: Route | None) -> Lowered:
        return lower(self.graph.module, self.schemes(scheme), "nvfp4", route)

    def run(self, lowered: Lowered, inputs: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """The outputs of a lowered graph, each weight packed as it is."""
        return served(lowered, self.inputs if inputs is None else inputs)

    def folded(self, seed: int) -> list[Any]:
        """The inputs with a random order in every free group."""
        groups = propagate(self.graph, self.inputs)
        orders = random_orders(groups, seed)
        names = {index: name for name, index in self.graph.positions.items()}
        return [
            fold(names[i], x, groups, orders) if i in names else x
            for i, x in enumerate(self.inputs)
        ]


@torch.no_grad()
def served(lowered: Lowered, given: Sequence[Any]) -> tuple[Any, ...]:
    """What the lowered graph computes of the inputs of the graph it was; they are left alone."""
    packed = {i: NVFP4.quantize(NVFP4.pad(given[i])) for i in lowered.packed}
    flat = [
        given[one.argument] if one.field is None else packed[one.argument][one.field]
        for one in lowered.sources
    ]
    copies = [x.clone() if isinstance(x, Tensor) else x for x in flat]
    return tuple(pytree.tree_leaves(lowered.module(*copies)))


def captures(
    model: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = False,
    simplified: bool = True,
    **kwargs: Any,
) -> list[Captured]:
    """The graphs of one call of ``model``."""
    found: list[Captured] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen = simplify(module) if simplified else module
        found.append(Captured(capture(seen, inputs), tuple(inputs)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return found


def captured(model: Callable[..., Any], *args: Any, **how: Any) -> Captured:
    """The one graph of a call of ``model``."""
    (one,) = captures(model, *args, **how)
    return one


def calls(module: fx.GraphModule) -> Mapping[str, int]:
    """How many calls of our operators a graph holds, by name."""
    names = [str(n.target) for n in module.graph.nodes if "permuquant" in str(n.target)]
    return {name: sum(f".{name}." in one for one in names) for name in OPERATORS}
