"""What a node of Dynamo's graph means in the language of row programs, however it was spelled."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

LAST = object()
"""An operand: the result of the step before."""

Steps = tuple[tuple[str, tuple[Any, ...]], ...]
"""(operation, operands); an operand is a node, a number or ``LAST``. Operation "same": no step."""

BINARY: Mapping[Any, str] = {
    operator.add: "add",
    torch.add: "add",
    operator.sub: "sub",
    torch.sub: "sub",
    operator.mul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
}

UNARY: Mapping[Any, str] = {
    operator.neg: "neg",
    torch.neg: "neg",
    torch.square: "square",
    torch.sqrt: "sqrt",
    torch.rsqrt: "rsqrt",
    torch.exp: "exp",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.relu: "relu",
    F.relu: "relu",
    F.silu: "silu",
    F.sigmoid: "sigmoid",
    F.tanh: "tanh",
    **{word: word for word in ("neg", "square", "sqrt", "rsqrt", "exp", "tanh", "sigmoid", "relu")},
}

SAME = ("to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone")


def steps_of(node: fx.Node) -> Steps | None:
    """The steps of ``node``; None if it is not described. A conversion between floating dtypes is
    none: a program computes in fp32 throughout.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in BINARY:
        plain = len(node.args) == 2 and not node.kwargs and all(map(_operand, node.args))
        return ((BINARY[node.target], tuple(node.args)),) if plain else None
    if node.target in UNARY:
        plain = len(node.args) == 1 and not any(node.kwargs.values())
        return ((UNARY[node.target], tuple(node.args)),) if plain else None
    if node.op == "call_method" and node.target in SAME:
        return _same(node)
    special = SPECIAL.get(node.target)
    return special(node) if special else None


def _operand(value: Any) -> bool:
    return isinstance(value, fx.Node) or (type(value) in (int, float) and math.isfinite(value))


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments by name, however they were passed; absent ones are None."""
    given = dict.fromkeys(names) | dict(zip(names, node.args, strict=False))
    return given | dict(node.kwargs)


def _same(node: fx.Node) -> Steps | None:
    source = node.args[0]
    before = source.meta.get("example_value") if isinstance(source, fx.Node) else None
    after = node.meta.get("example_value")
    alike = (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.is_floating_point()
        and after.is_floating_point()
        and before.device == after.device
    )
    return (("same", (source,)),) if alike else None


def _gelu(node: fx.Node) -> Steps | None:
    given = _given(node, "input", "approximate")
    exact = given["approximate"] in (None, "none")
    return (("gelu" if exact else "gelu_tanh", (given["input"],)),)


def _dropout(node: fx.Node) -> Steps | None:
    given = _given(node, "input", "p", "training", "inplace")
    idle = given["p"] == 0.0 or given["training"] is False
    return (("same", (given["input"],)),) if idle and not given["inplace"] else None


def _norm(op: str) -> Callable[[fx.Node], Steps | None]:
    bias = ("bias",) if op == "layer_norm" else ()
    names = ("input", "normalized_shape", "weight", *bias, "eps")

    def steps(node: fx.Node) -> Steps | None:
        given = _given(node, *names)
        eps = 1e-5 if given["eps"] is None and op == "layer_norm" else given["eps"]
        if len(given["normalized_shape"]) != 1 or not isinstance(eps, float):
            return None
        found: list[tuple[str, tuple[Any, ...]]] = [(op, (given["input"], eps))]
        if given["weight"] is not None:
            found.append(("mul", (LAST, given["weight"])))
        if given.get("bias") is not None:
            found.append(("add", (LAST, given["bias"])))
        return tuple(found)

    return steps


def _power(node: fx.Node) -> Steps | None:
    given = _given(node, "input", "exponent")
    return (("square", (given["input"],)),) if given["exponent"] in (2, 2.0) else None


def _mean(node: fx.Node) -> Steps | None:
    given = _given(node, "input", "dim", "keepdim", "dtype")
    last = given["dim"] in (-1, [-1], (-1,))
    return (("mean", (given["input"],)),) if last and given["keepdim"] is True else None


SPECIAL: Mapping[Any, Callable[[fx.Node], Steps | None]] = {
    F.gelu: _gelu,
    F.dropout: _dropout,
    F.layer_norm: _norm("layer_norm"),
    torch.layer_norm: _norm("layer_norm"),
    F.rms_norm: _norm("rms_norm"),
    torch.rms_norm: _norm("rms_norm"),
    torch.pow: _power,
    operator.pow: _power,
    "pow": _power,
    torch.mean: _mean,
    "mean": _mean,
}
