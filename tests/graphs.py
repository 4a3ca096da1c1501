"""Capture a model's graph as the backend would, and run it with reordered parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes.capture import Graph, capture
from passes.fold import fold
from passes.propagate import propagate
from pq_compile.plan import Groups, Orders


@dataclass
class Traced:
    """One graph as Dynamo handed it to the backend, with the real inputs of that call."""

    graph: Graph
    inputs: tuple[Any, ...]

    @cached_property
    def groups(self) -> Groups:
        return propagate(self.graph, self.inputs)

    def run(self, orders: Orders | None = None, except_for: str = "") -> tuple[Tensor, ...]:
        """The graph's outputs with its parameters folded by ``orders``, but for one of them."""
        names = {index: name for name, index in self.graph.positions.items()}
        inputs = [
            fold(names[index], value, self.groups, orders)
            if orders and index in names and names[index] != except_for
            else value
            for index, value in enumerate(self.inputs)
        ]
        with torch.no_grad():
            copies = [one.clone() if isinstance(one, Tensor) else one for one in inputs]
            return tuple(pytree.tree_leaves(self.graph.module(*copies)))


def trace(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = False, **kwargs: Any
) -> Traced:
    """The one graph of a call of ``model``."""
    found: list[Traced] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(Traced(capture(module, inputs), tuple(inputs)))
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    assert len(found) == 1
    return found[0]


def double_precision(traced: Traced) -> None:
    """Casts to float32 inside the graph become casts to float64, in place."""
    replacement = {torch.float32: torch.float64, torch.float16: torch.float64}
    for node in traced.graph.module.graph.nodes:
        node.args = pytree.tree_map(lambda x: _widened(x, replacement), node.args)
        node.kwargs = pytree.tree_map(lambda x: _widened(x, replacement), node.kwargs)
        if node.op == "call_method" and node.target == "float":
            node.target = "double"
    traced.graph.module.recompile()


def _widened(value: Any, replacement: dict[torch.dtype, torch.dtype]) -> Any:
    return replacement.get(value, value) if isinstance(value, torch.dtype) else value


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number of that output."""
    errors = [
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return max(errors)
