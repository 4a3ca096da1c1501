"""``cat([x[:, :n], x[:, n:]], 1) = x``: a stream that a model takes apart and puts together again
between two blocks stays whole, so that what follows can be computed together with what came before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from .capture import Graph, capture
from .storage import written


def captured(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Graph:
    """``capture`` of the graph simplified; as it is if it writes to a tensor, or may.

    What was a copy would be the tensor itself then.
    """
    graph = capture(simplify(module), example_inputs)
    if graph.module is module or (graph.view is not None and not written(graph.view)):
        return graph
    return capture(module, example_inputs)


def simplify(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` with such concatenations replaced by what they put together; names stay.

    The module itself where there are none.
    """
    wholes = {node: whole for node in module.graph.nodes if (whole := _whole(node)) is not None}
    if not wholes:
        return module
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in wholes:
            new[node] = new[wholes[node]]
            continue
        new[node] = graph.node_copy(node, lambda old: new[old])
        if hasattr(node, "_dynamo_source"):  # an attribute of placeholders, which has their names
            new[node]._dynamo_source = node._dynamo_source
    pieces = dict.fromkeys(piece for node in wholes for piece in node.all_input_nodes)
    for piece in pieces:
        if not new[piece].users:
            graph.erase_node(new[piece])
    return _like(module, graph)


def _like(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """``graph`` in place of that of ``module``, and all that Dynamo noted on the module."""
    found = fx.GraphModule(module, graph)
    found.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        found._param_name_to_source = module._param_name_to_source
    return found


def _whole(node: fx.Node) -> fx.Node | None:
    """The tensor that ``node`` concatenates all the slices of, in order; None if it doesn't."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
        return None
    if any(user.op == "output" for user in node.users):  # whoever gets a result may write to it
        return None
    given: dict[str, Any] = {"dim": 0} | dict(zip(("tensors", "dim"), node.args, strict=False))
    given |= node.kwargs
    cuts = [_slice(piece, given["dim"]) for piece in given["tensors"]]
    if len(cuts) < 2 or any(cut is None for cut in cuts):
        return None
    sources = {cut[0] for cut in cuts if cut}
    bounds = [(cut[1].start, cut[1].stop) for cut in cuts if cut]
    meets = all((a[1] is not None and a[1] is b[0]) or a[1] == b[0] for a, b in pairwise(bounds))
    if len(sources) > 1 or not meets or bounds[0][0] not in (None, 0) or bounds[-1][1] is not None:
        return None
    source = sources.pop()
    stops = [stop for _, stop in bounds[:-1]]
    inside = all(_within(stop, source, given["dim"]) for stop in stops)
    return source if inside and stops == sorted(stops) else None


def _slice(piece: Any, dim: int) -> tuple[fx.Node, slice] | None:
    """(x, slice) if ``piece`` is ``x[:, ..., slice]`` with the slice at ``dim``, of step 1."""
    if not isinstance(piece, fx.Node) or piece.target is not operator.getitem:
        return None
    source: Any = piece.args[0]
    index: Any = piece.args[1]
    if not isinstance(index, tuple) or len(index) != dim + 1 or not isinstance(source, fx.Node):
        return None
    if not all(isinstance(one, slice) for one in index):
        return None
    *before, last = index
    if any(one != slice(None) for one in before) or last.step not in (None, 1):
        return None
    return source, last


def _within(stop: Any, source: fx.Node, dim: int) -> bool:
    """Whether a cut lies inside the tensor, so that no slice is shorter than it says."""
    value = source.meta.get("example_value")
    if not isinstance(value, Tensor) or not isinstance(stop, int):
        return False
    size = value.shape[dim]
    return isinstance(size, int) and 0 <= stop <= size
