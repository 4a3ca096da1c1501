"""Which tensors share memory, and which of it the graph writes to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .capture import Graph


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory; vmap's are looked through."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def written(view: fx.GraphModule) -> dict[int, fx.Node]:
    """The storages that some node of the view writes to, or may, with the first such node."""
    found: dict[int, fx.Node] = {}
    for node in view.graph.nodes:
        for target in _targets(node):
            value = target.meta.get("val")
            if isinstance(value, Tensor):
                found.setdefault(storage_of(value), node)
    return found


def written_parameters(graph: Graph) -> dict[str, str]:
    """Why a weight that the graph writes to cannot be packed, by name: it changes during a call."""
    if graph.view is None:
        return {}
    found = written(graph.view)
    inputs = graph.view.graph.find_nodes(op="placeholder")
    sources = graph.module.graph.find_nodes(op="placeholder")
    return {
        graph.parameters[source.name]: "the graph writes to its weight"
        for node, source in zip(inputs, sources, strict=True)
        if source.name in graph.parameters and storage_of(node.meta["val"]) in found
    }


def writes(node: fx.Node) -> bool:
    """Whether the op changes one of its operands."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _targets(node: fx.Node) -> list[fx.Node]:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes  # a kernel of the user's, say, has no schema to ask
    if not writes(node):
        return []
    assert isinstance(node.target, torch._ops.OpOverload)
    found: list[Any] = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            found += pytree.tree_leaves(given)
    return [one for one in found if isinstance(one, fx.Node)]


def aliased(graph: Graph, example_inputs: Sequence[Any]) -> list[tuple[str, str]]:
    """Parameters that share memory with another input, and a reason that names both.

    Two slices of one buffer that do not overlap share nothing.
    """
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    spans: dict[int, list[tuple[int, int, str]]] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for node, value in zip(placeholders, example_inputs, strict=True):
            if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
                start, end = _span(value)
                name = graph.parameters.get(node.name, node.name)
                spans.setdefault(storage_of(value), []).append((start, end, name))
    found = []
    for users in spans.values():
        for (a, b, first), (c, d, second) in combinations(users, 2):
            if a < d and c < b:
                reason = f"memory that {first} and {second} share"
                found += [(first, reason), (second, reason)]
    return found


def _span(value: Tensor) -> tuple[int, int]:
    """The bytes of its storage between which a tensor lies."""
    steps = zip(value.shape, value.stride(), strict=True)
    start = int(value.storage_offset())
    end = start + sum(int((size - 1) * stride) for size, stride in steps) + 1
    return start * value.element_size(), end * value.element_size()
