"""Rows and the products that read them, as one operator: the host pays for one call, not for two.

    a, kept = rows(inputs, program)            y, kept = site(inputs, weights, biases, program, ...)
    y = matmul(a, weights, biases, kind)

What is computed is the same, and in the same order on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from pq_compile.rows import parse

from .lower import QUANTISED


def join(module: fx.GraphModule) -> fx.GraphModule:
    """``module``, in place, with every ``rows`` and all that multiply its result joined.

    Left as they are where a weight or bias is computed: it may not be there yet.
    """
    operators = torch.ops.permuquant
    for node in module.graph.find_nodes(op="call_function", target=operators.rows.default):
        items = {user.args[1]: user for user in node.users}
        rows = [items[i] for i in range(_quantised(node)) if i in items]
        products = list(dict.fromkeys(user for row in rows for user in row.users))
        operands = [one for product in products for one in product.all_input_nodes]
        if all(product.target is operators.matmul.default for product in products) and all(
            one in rows or one.op == "placeholder" for one in operands
        ):
            _join(module.graph, node, items, products)
    module.recompile()
    return module


def _join(
    graph: fx.Graph, node: fx.Node, items: Mapping[Any, fx.Node], products: Sequence[fx.Node]
) -> None:
    given: list[Any] = [product.args for product in products]
    weights = [field for args in given for each in zip(*args[1:4], strict=True) for field in each]
    biases = [bias for args in given for bias in args[4]]
    inputs, program = node.args
    kind, dtype = given[0][5:]
    teams, biased = [len(args[1]) for args in given], [len(args[4]) for args in given]
    kept = {i: one for i, one in items.items() if i >= _quantised(node)}
    places = {product: i for i, product in enumerate(products)}
    places |= {one: len(products) + i - _quantised(node) for i, one in kept.items()}
    with graph.inserting_after(node):
        arguments = (inputs, weights, biases, program, kind, teams, biased, dtype)
        joined = graph.call_function(torch.ops.permuquant.site.default, arguments)
    joined.meta = dict(node.meta)
    for old, place in places.items():
        with graph.inserting_after(joined):
            new = graph.call_function(getitem, (joined, place))
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
    for gone in [*products, *items.values(), node]:
        graph.erase_node(gone)


def _quantised(node: fx.Node) -> int:
    """How many of what ``rows`` returns are the rows."""
    program = node.args[1]
    assert isinstance(program, str)
    return QUANTISED[parse(program).target]
