"""Which parameter axes one permutation moves together, and what pins the others.

``W2 f(W1 x) = (W2 Pᵀ) f(P W1 x)``: the rows of W1 and the columns of W2 are one group. Every
parameter axis starts as one leaf of its own; walking the graph once, each op's rule ties, cuts and
pins leaves.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pq_compile.plan import Axis, Groups

from . import operators
from .axes import Channels, Fixed, Leaf, Row, Size, Value
from .calls import Call
from .capture import TAG, Graph, source_of, user_path
from .equations import Undescribed, read
from .groups import extend, gather, merge, random_orders, rename
from .rules import LOOK_AT_NO_VALUE, POINTWISE, rule_of
from .storage import aliased, storage_of, writes, written

__all__ = ["extend", "merge", "propagate", "random_orders", "rename", "spread"]

Rows = Mapping[Axis, Row]


def propagate(graph: Graph, example_inputs: Sequence[Any]) -> Groups:
    """The groups of the parameters' axes, as the graph ties and pins them.

    ``example_inputs`` are the real tensors: parameters that share memory are found on them.
    """
    return gather(spread(graph, example_inputs))


def spread(graph: Graph, example_inputs: Sequence[Any]) -> Rows:
    """The row of every parameter axis, with all ties, cuts and pins of the graph applied."""
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    sizes = {
        graph.parameters[node.name]: node.meta["example_value"].shape
        for node in placeholders
        if node.name in graph.parameters
    }
    rows: dict[Axis, Row] = {
        Axis(name, dim): (Leaf(int(size), f"{name}[{dim}]"),)
        for name, shape in sizes.items()
        for dim, size in enumerate(shape)
    }
    for name, reason in aliased(graph, example_inputs):
        _pin_parameter(rows, name, reason)
    if graph.view is None:
        for axis in rows:
            rows[axis][0].pin((str(graph.view_error),))
        return rows
    _Walk(graph, rows, written(graph.view)).run(graph.view)
    return rows


def _pin_parameter(rows: Rows, name: str, reason: str) -> None:
    for axis, row in rows.items():
        if axis.parameter == name:
            for leaf in row:
                leaf.pin((reason,))


@dataclass
class _Walk:
    """One pass over the view: the value of every node, in order."""

    graph: Graph
    rows: Rows
    written: Mapping[int, fx.Node]

    def run(self, view: fx.GraphModule) -> None:
        env: dict[fx.Node, Any] = {}
        sources = iter(self.graph.module.graph.find_nodes(op="placeholder"))
        for node in view.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._input(node, next(sources))
            elif node.op == "output":
                self._output(node, env)
            else:
                env[node] = self._guarded(node, self._result(node, env))

    def _input(self, node: fx.Node, source: fx.Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return _known(value)
        name = self.graph.parameters.get(source.name)
        if name is None:
            return Value.fixed(sizes_of(value), f"graph input {_input_name(source)}")
        writer = self.written.get(storage_of(value))
        if writer is not None:
            _pin_parameter(self.rows, name, self._written_by(writer))
        dims = (Channels.of(*self.rows[Axis(name, dim)]) for dim in range(value.ndim))
        return Value(sizes_of(value), tuple(dims))

    def _output(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> None:
        results = pytree.tree_leaves(node.args[0])
        for index, result in enumerate(results):
            if isinstance(result, fx.Node) and isinstance(env[result], Value):
                env[result].pin(f"graph output {index}")

    def _result(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """The value of a node: by its rule, or pinned with everything it touches."""
        result = node.meta.get("val")
        if base_name(node) in LOOK_AT_NO_VALUE:
            return _known(result)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.get)
        if node.target is operator.getitem and isinstance(args[0], tuple):
            return args[0][node.args[1]]  # type: ignore[index]
        operands = [value for value in _leaves((args, kwargs)) if isinstance(value, Value)]
        call = Call(_shapes(result), self._why(node))
        if not operands and rule_of(node.target) is not operators.constant:
            return _fixed(result, f"constant {call.why}")
        try:
            return apply(node, call, args, kwargs)
        except Undescribed:
            reason = call.why
        except Exception as error:  # a rule that fails costs freedom, never correctness
            reason = f"{call.why}: its rule failed with {error!r}"
        for value in operands:
            value.pin(reason)
        return _fixed(result, reason)

    def _guarded(self, node: fx.Node, value: Any) -> Any:
        """A value that is written to later is not the same everywhere, even if it was made so."""
        if isinstance(value, tuple):
            return value
        result = node.meta.get("val")
        if not isinstance(value, Value) or not isinstance(result, Tensor):
            return value
        if storage_of(result) not in self.written:
            return value
        reason = self._written_by(self.written[storage_of(result)])
        dims = (
            Fixed((reason,)) if dim is None and size != 1 else dim
            for dim, size in zip(value.dims, value.shape, strict=True)
        )
        return Value(value.shape, tuple(dims))

    def _written_by(self, node: fx.Node) -> str:
        what = "written in place" if writes(node) else "a possible write"
        return f"{what} by {self._why(node)}"

    def _why(self, node: fx.Node) -> str:
        """``aten.cat (node cat_3, in blocks.0.attn)``: Dynamo's node, and the module it is in."""
        name = node.meta.get("custom", {}).get(TAG, node.name)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = user_path(stack[-1][0]) if stack else ""
        what = str(node.target).rpartition(".")[0] or str(node.target)
        return f"{what} (node {name}{f', in {path}' if path else ''})"


def apply(node: fx.Node, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of one op by its rule. Raises ``Undescribed`` if there is none."""
    if writes(node):
        return _in_place(node, call, args, kwargs)
    rule = rule_of(node.target)
    if rule is None:
        raise Undescribed
    if not isinstance(rule, str):
        return rule(call, *args, **kwargs)
    if len(call.shapes) != 1:
        raise Undescribed
    operands = tensor_operands(node.target, args, kwargs)
    if rule == POINTWISE:
        operands = [value for value in operands if value is not None]
        rule = f"{', '.join(['...'] * len(operands))} -> ..."
    return read(rule, operands, call.shape, call.why)


def _in_place(node: fx.Node, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Value:
    """``x.add_(y)``: x is ordered as before, y like x. Whatever shares memory with x stays true.

    What writes elsewhere than to its first operand (``out=``) is not described.
    """
    name = base_name(node).removesuffix("_")
    if name == base_name(node):
        raise Undescribed
    target: Value = args[0]
    if name in ("aten.fill", "aten.zero"):
        return target
    if rule_of(name) != POINTWISE:
        raise Undescribed
    operands = [value for value in tensor_operands(node.target, args, kwargs) if value is not None]
    read(f"{', '.join(['...'] * len(operands))} -> ...", operands, target.shape, call.why)
    return target


def tensor_operands(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Value | None]:
    """The operands that the op's schema declares as tensors, in order; None where absent."""
    operands: list[Value | None] = []
    for index, argument in enumerate(target._schema.arguments):
        if "Tensor" not in str(argument.type):
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(value, list | tuple):
            raise Undescribed
        operands.append(value if isinstance(value, Value) else None)  # a number has no axes
    return operands


def _input_name(node: fx.Node) -> str:
    """``hidden_states`` of ``L['hidden_states']`` or ``L['kwargs']['hidden_states']``."""
    source = source_of(node)
    plain = re.fullmatch(r"[LG](?:\['kwargs'\])?\['([^']*)'\]", source)
    return plain[1] if plain else user_path(source) or source


def base_name(node: fx.Node) -> str:
    """``aten.add_`` of ``aten.add_.Tensor``."""
    return str(node.target).rpartition(".")[0]


def sizes_of(value: Tensor) -> tuple[Size, ...]:
    """The sizes of a fake tensor, symbolic ones as expressions: comparing those adds no guard."""
    return tuple(_known(size) for size in value.shape)


def _known(value: Any) -> Any:
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression) if isinstance(expression, sympy.Integer) else expression


def _shapes(result: Any) -> tuple[tuple[Size, ...], ...]:
    tensors = pytree.tree_leaves(result)
    return tuple(sizes_of(value) for value in tensors if isinstance(value, Tensor))


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda node: isinstance(node, Value))


def _fixed(result: Any, reason: str) -> Any:
    """A value of the structure of ``result`` in which nothing moves."""
    if isinstance(result, Tensor):
        return Value.fixed(sizes_of(result), reason)
    if isinstance(result, list | tuple):
        return tuple(_fixed(one, reason) for one in result)
    return _known(result)
