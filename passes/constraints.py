"""The ties and pins behind the groups as a graph, to ask why an axis may not move.

Nodes are axes, leaves and reasons (strings); an edge leads to what pins its tail, and says which
op made it so. The union-find that does the propagating forgets the way to its roots; this graph is
made from its log afterwards.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import networkx as nx

from pq_compile.plan import Axis

from .axes import Leaf
from .propagate import Rows


def constraint_graph(rows: Rows) -> nx.DiGraph[Any]:
    """Of the rows that ``spread`` found; an edge between leaves has the attribute ``op``."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    todo: list[Leaf] = []
    for axis, row in rows.items():
        graph.add_edges_from((axis, leaf) for leaf in row)
        todo += row
    seen: set[Leaf] = set()
    while todo:
        leaf = todo.pop()
        if leaf in seen:
            continue
        seen.add(leaf)
        graph.add_edges_from((leaf, reason) for reason in leaf.causes)
        for other, op in leaf.ties:
            graph.add_edge(leaf, other, op=op)
            todo.append(other)
    return graph


def why(graph: nx.DiGraph[Any], axis: Axis) -> list[str]:
    """The shortest way from an axis to what pins it, one step a line; empty if it is free.

    ``graph`` is a ``constraint_graph``. Raises ``KeyError`` if it has no such axis.
    """
    if axis not in graph:
        raise KeyError(str(axis))
    ways = nx.single_source_shortest_path(graph, axis)
    reasons = [node for node in ways if isinstance(node, str)]
    if not reasons:
        return []
    way = ways[min(reasons, key=lambda reason: (len(ways[reason]), reason))]
    edges = pairwise(way[1:-1])
    steps = dict.fromkeys(graph.edges[edge]["op"] for edge in edges)  # heads are cut off one by one
    return [str(axis), *steps, f"pinned by {way[-1]}"]


def every_pin(rows: Rows) -> str:
    """Why each axis that may not move may not: its way to what pins it, one axis a line."""
    graph = constraint_graph(rows)
    ways = (why(graph, axis) for axis in rows)
    return "".join(f"{' <- '.join(way)}\n" for way in ways if way)
