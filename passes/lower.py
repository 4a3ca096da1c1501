"""``linear(x, W, b)`` becomes quantised rows times packed weights.

    permuquant.linear(x, pack(W), b)                  where nothing is to be fused
    a = permuquant.rows(inputs of a chain, program)   quantised once for all that read it
    y = permuquant.matmul(a, pack(W), b)              one product for the weights that read it

The packed tensors enter the lowered graph as inputs, where the weight was one before: one compiled
graph serves every block of a kind, and nothing about a weight's values is baked into it. Folding
changes no graph at all, so the lowered graph does not depend on the permutations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from pq_compile.formats import FORMATS, Format
from pq_compile.released import Released
from pq_compile.routes import Route

from .fuse import Chain, chains
from .teams import Operands, operands, readers, size, teams

FIELDS = ("packed", "scales", "tensor_scale")
QUANTISED = {"fp8": 2, "nvfp4_fp8": 2, "nvfp4_half": 2, "nvfp4": 3}
"""How many tensors a target's rows are."""


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


def lower(
    module: fx.GraphModule,
    routes: Mapping[str, str],
    format_name: str,
    route: Route | None = None,
    wish: str = "auto",
) -> Lowered:
    """Rewrite the linears named in ``routes`` (node name -> scheme); ``module`` stays.

    ``route`` is how those of its scheme are multiplied; what they read is quantised by row programs
    if it says to what. The others, and all if it is None, are a ``permuquant.linear`` each, which
    takes the route that is named ``wish`` where it can. A weight that is also read by something
    else stays an input beside its packed form.
    """
    return _Lowering(module, routes, format_name, route, wish).lowered()


class _Lowering:
    """One graph on its way: ``new`` maps the nodes of the old one to those of the new."""

    def __init__(
        self,
        module: fx.GraphModule,
        routes: Mapping[str, str],
        format_name: str,
        route: Route | None,
        wish: str,
    ) -> None:
        self.module, self.routes, self.format, self.route = module, routes, format_name, route
        self.wish = [] if wish == "auto" else [wish]
        self.linears = {n: operands(n) for n in module.graph.nodes if n.name in routes}
        self.chains: dict[fx.Node, Chain] = {}
        self.teams: dict[fx.Node, tuple[fx.Node, ...]] = {}
        if route and route.target:
            alike = readers(self.linears, routes, route)
            self.chains = chains(module, alike, route.target)
            found = [teams(alike[root], self.linears, route.kind) for root in self.chains]
            self.teams = {team[0]: team for each in found for team in each}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.packed: dict[fx.Node, list[fx.Node]] = {}
        self.rows: dict[fx.Node, list[fx.Node]] = {}  # root -> its quantised tensors
        self.replaced: set[fx.Node] = set()  # what chains compute, as it was computed before

    def lowered(self) -> Lowered:
        sources, weights = self._inputs()
        teamed = {node for team in self.teams.values() for node in team}
        for node in self.module.graph.nodes:
            if node in self.teams:
                self._product(self.teams[node])
            elif node in self.linears and node not in teamed:
                self._linear(node)
            elif node.op != "placeholder" and node not in teamed:
                self.new[node] = self.graph.node_copy(node, lambda old: self.new[old])
            if node in self.chains:
                self._quantise(self.chains[node])
        for node in reversed(self.graph.nodes):
            if node in self.replaced and not node.users:
                self.graph.erase_node(node)
        return Lowered(fx.GraphModule(self.module, self.graph), tuple(sources), weights)

    def _inputs(self) -> tuple[list[Source], tuple[int, ...]]:
        """The inputs: those that somebody reads as they are, then the packed weights."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        weights = list(dict.fromkeys(weight for _, weight, _ in self.linears.values()))
        index = {node: i for i, node in enumerate(placeholders)}
        gone = {
            weight
            for weight in weights
            if all(_only_weight(user, weight, self.linears) for user in weight.users)
        }
        sources = [Source(index[node]) for node in placeholders if node not in gone]
        for node in placeholders:
            if node not in gone:
                self.new[node] = self.graph.node_copy(node)
        for weight in weights:
            names = [f"{weight.name}{field}" for field in FIELDS]
            self.packed[weight] = [self.graph.placeholder(name) for name in names]
            sources += [Source(index[weight], field) for field in range(len(FIELDS))]
        return sources, tuple(index[weight] for weight in weights)

    def _linear(self, node: fx.Node) -> None:
        """One linear by itself."""
        x, weight, bias = self.linears[node]
        given = (self.new[x], *self.packed[weight], None if bias is None else self.new[bias])
        how = (self.format, self.routes[node.name], *self.wish)
        self.new[node] = self._call("linear", (*given, *how), node)
        self.new[node].meta = dict(node.meta)

    def _quantise(self, chain: Chain) -> None:
        """What the chain computes, in place of the nodes that did: those are read no more."""
        inputs = [self.new[one] for one in chain.inputs]
        both = self._call("rows", (inputs, str(chain.program)), chain.root)
        count = QUANTISED[chain.program.target]
        found = [self.graph.call_function(getitem, (both, i)) for i in range(count)]
        self.rows[chain.root] = found
        self.replaced.update(self.new[node] for node in chain.inside)
        for i, node in enumerate(chain.kept):
            self.new[node] = self.graph.call_function(getitem, (both, count + i))
            self.new[node].meta = dict(node.meta)

    def _product(self, team: Sequence[fx.Node]) -> None:
        """Linears that read one tensor, as one product whose outputs lie side by side."""
        assert self.route is not None
        root = self.linears[team[0]][0]
        weights = [self.packed[self.linears[node][1]] for node in team]
        biases = [self.new[bias] for node in team if (bias := self.linears[node][2]) is not None]
        given = (self.rows[root], *(list(field) for field in zip(*weights, strict=True)), biases)
        dtype = team[0].meta["example_value"].dtype
        y = self._call("matmul", (*given, self.route.kind, dtype), team[0])
        if len(team) == 1:
            self.new[team[0]] = y
            return
        widths = [size(self.linears[node][1])[0] for node in team]
        parts = self.graph.call_function(torch.split, (y, widths, -1))
        for i, node in enumerate(team):
            self.new[node] = self.graph.call_function(getitem, (parts, i))
            self.new[node].meta = dict(node.meta)

    def _call(self, name: str, arguments: tuple[Any, ...], like: fx.Node) -> fx.Node:
        target = getattr(torch.ops.permuquant, name).default
        node = self.graph.call_function(target, arguments)
        node.meta = {key: value for key, value in like.meta.items() if key != "example_value"}
        return node


def example_inputs(
    lowered: Lowered, given: Sequence[Any], format_name: str, mode: FakeTensorMode | None
) -> list[Any]:
    """Inputs to compile the lowered graph with: Dynamo's own, and fakes of what serves in place."""
    fakes = {i: fake_packed(given[i], FORMATS[format_name], mode) for i in lowered.packed}
    return [
        _as_served(given[source.argument], mode)
        if source.field is None
        else fakes[source.argument][source.field]
        for source in lowered.sources
    ]


def _as_served(given: Any, mode: FakeTensorMode | None) -> Any:
    """A released parameter has no strides of its own; its reordered copy is contiguous."""
    if not isinstance(given, Released):
        return given
    with mode or FakeTensorMode():
        return torch.empty(given.shape, dtype=given.dtype, device=given.device)


def fake_packed(weight: Tensor, format_: Format, mode: FakeTensorMode | None) -> tuple[Tensor, ...]:
    """Shapes, dtypes and device of ``format_.quantize(weight)`` without its values."""
    with mode or FakeTensorMode():
        dense = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return format_.quantize(format_.pad(dense))


def _only_weight(user: fx.Node, weight: fx.Node, linears: Mapping[fx.Node, Operands]) -> bool:
    operands = linears.get(user)
    return (
        operands is not None and operands[1] is weight and weight not in (operands[0], operands[2])
    )
