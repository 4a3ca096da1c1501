"""``linear(x, W, b)`` becomes ``permuquant.linear(x, pack(W), b)``.

The packed tensors enter the lowered graph as inputs, where the weight was one before: one compiled
graph serves every block of a kind, and nothing about a weight's values is baked into it. Folding
changes no graph at all, so the lowered graph does not depend on the permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from pq_compile.formats import FORMATS, Format

FIELDS = ("packed", "scales", "tensor_scale")


class Source(NamedTuple):
    """An input of the lowered graph is ``argument``, or a packed field of it."""

    argument: int
    field: int | None = None  # index into FIELDS


@dataclass(frozen=True)
class Lowered:
    """The rewritten graph and the sources of its inputs, in order."""

    module: fx.GraphModule
    sources: tuple[Source, ...]
    packed: tuple[int, ...]  # argument indices of the weights it wants packed


def lower(module: fx.GraphModule, routes: Mapping[str, str], format_name: str) -> Lowered:
    """Rewrite the linears named in ``routes`` (node name -> "w4a4" or "w4a16"); ``module`` stays.

    A weight that is also read by something else stays an input beside its packed form.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    linears = {node: operands(node) for node in module.graph.nodes if node.name in routes}
    weights = list(dict.fromkeys(weight for _, weight, _ in linears.values()))
    gone = {
        weight
        for weight in weights
        if all(_only_weight(user, weight, linears) for user in weight.users)
    }

    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    sources: list[Source] = []
    for node in placeholders:
        if node not in gone:
            new[node] = graph.node_copy(node, lambda old: new[old])
            sources.append(Source(index[node]))
    packed: dict[fx.Node, list[fx.Node]] = {weight: [] for weight in weights}
    for weight in weights:
        for field, suffix in enumerate(FIELDS):
            packed[weight].append(graph.placeholder(f"{weight.name}{suffix}"))
            sources.append(Source(index[weight], field))
    for node in module.graph.nodes:
        if node in linears:
            x, weight, bias = linears[node]
            arguments = (new[x], *packed[weight], None if bias is None else new[bias])
            new[node] = graph.call_function(
                torch.ops.permuquant.linear.default, (*arguments, format_name, routes[node.name])
            )
            new[node].meta = dict(node.meta)
        elif node.op != "placeholder":
            new[node] = graph.node_copy(node, lambda old: new[old])
    return Lowered(fx.GraphModule(module, graph), tuple(sources), tuple(index[w] for w in weights))


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Input, weight and bias of a linear node, however they were passed."""
    given: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False))
    given |= node.kwargs
    return given["input"], given["weight"], given.get("bias")


def example_inputs(
    lowered: Lowered, given: Sequence[Any], format_name: str, mode: FakeTensorMode | None
) -> list[Any]:
    """Inputs to compile the lowered graph with: Dynamo's own, and fake packed tensors."""
    fakes = {i: fake_packed(given[i], FORMATS[format_name], mode) for i in lowered.packed}
    return [
        given[source.argument] if source.field is None else fakes[source.argument][source.field]
        for source in lowered.sources
    ]


def fake_packed(weight: Tensor, format_: Format, mode: FakeTensorMode | None) -> tuple[Tensor, ...]:
    """Shapes, dtypes and device of ``format_.quantize(weight)`` without its values."""
    with mode or FakeTensorMode():
        dense = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return format_.quantize(format_.pad(dense))


def _only_weight(
    user: fx.Node, weight: fx.Node, linears: Mapping[fx.Node, tuple[Any, ...]]
) -> bool:
    operands = linears.get(user)
    return (
        operands is not None and operands[1] is weight and weight not in (operands[0], operands[2])
    )
