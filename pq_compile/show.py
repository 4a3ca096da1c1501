"""The one printer: graphs, groups, statistics and plans as text.

Dumps, goldens, error messages and reports all print through ``show``. The same value prints the
same bytes in every process: no addresses, no file paths, no times, no order of a set.
"""

from __future__ import annotations

import operator
import re
import textwrap
import zlib
from collections.abc import Iterable, Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, fx

from .permutation import Permutation
from .plan import Group, Groups, LinearPlan, Plan, Statistics, Verdict

WIDTH = 100
META = ("example_value", "val")  # where Dynamo and make_fx keep a node's value
ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@singledispatch
def show(value: object, names: Mapping[str, str] | None = None) -> str:
    """``value`` as text; ``names`` maps a graph's node names to the names to print instead.

    Takes an ``fx.GraphModule``, ``fx.Graph`` or ``fx.Node``, ``Groups``, ``Plan``, or a mapping of
    linear names to ``Statistics``. Raises ``TypeError`` for anything else.
    """
    raise TypeError(f"show() has no form for {type(value).__name__}")


# ---------------------------------------------------------------- graphs


@show.register
def show_module(module: fx.GraphModule, names: Mapping[str, str] | None = None) -> str:
    """A graph, one node a line: ``linear: f32[4, 6] = linear(x, up.weight, up.bias)``.

    The graphs of submodules follow, indented.
    """
    lines = [show_graph(module.graph, names)]
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            lines += [f"{name}:\n", textwrap.indent(show_module(child, names), "    ")]
    return "".join(lines)


@show.register
def show_graph(graph: fx.Graph, names: Mapping[str, str] | None = None) -> str:
    return _lines(show_node(node, names) for node in graph.nodes)


@show.register
def show_node(node: fx.Node, names: Mapping[str, str] | None = None) -> str:
    """One node on one line."""
    names = names or {}
    if node.op == "output":
        result = node.args[0]
        values = result if isinstance(result, tuple | list) else (result,)
        return f"return {', '.join(_argument(value, names) for value in values)}"
    name = names.get(node.name, node.name)
    value = _value(next((node.meta[key] for key in META if key in node.meta), None))
    typed = f"{name}: {value}" if value else name
    if node.op == "placeholder":
        return f"input {typed}"
    return f"{typed} = {_call(node, names)}"


def _call(node: fx.Node, names: Mapping[str, str]) -> str:
    given = [_argument(value, names) for value in node.args]
    given += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join(given)})"
    if node.op == "call_method":
        return f"{given[0]}.{node.target}({', '.join(given[1:])})"
    if node.target is operator.getitem:
        return f"{given[0]}[{_index(node.args[1], names)}]"
    return f"{_function(node.target)}({', '.join(given)})"


def _function(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    name = getattr(target, "__name__", None) or type(target).__name__
    return str(name)


def _index(index: Any, names: Mapping[str, str]) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_argument(part, names) for part in parts)


def _argument(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, fx.Node):
        return names.get(value.name, value.name)
    if isinstance(value, tuple | list):
        inside = ", ".join(_argument(part, names) for part in value)
        if isinstance(value, list):
            return f"[{inside}]"
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        items = (f"{key}: {_argument(part, names)}" for key, part in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, slice):
        ends = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if end is None else _argument(end, names) for end in ends)
    return _constant(value)


def _constant(value: Any) -> str:
    if value is Ellipsis:
        return "..."
    if isinstance(value, Tensor):
        return _value(value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.device):
        return str(value)
    if callable(value):
        return _function(value)
    return ADDRESS.sub("", repr(value))


def _value(value: Any) -> str:
    """The type of a node's value: ``f32[s0, 4]``, ``(f32[2], f32[2])``, ``s0``; "" if unknown."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, torch.Size):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_value(part) or 'None' for part in value)})"
    if isinstance(value, bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value)
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """``f32``, ``bf16``, ``i64``, ``u8``, ``f8_e4m3fn``, ``bool``."""
    name = str(dtype).removeprefix("torch.")
    for long, short in (("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        name = name.replace(long, short)
    return name


# ---------------------------------------------------------------- the values between the passes


@show.register
def show_groups(groups: Groups, names: Mapping[str, str] | None = None) -> str:
    """One group an entry: its axes, then ``free, 24 x 128`` or what pins it."""
    return _lines(_wrapped(f"{_axes(group)}: {_freedom(group)}") for group in groups.groups)


def _axes(group: Group) -> str:
    return " ".join([group.name, *map(str, group.axes[1:])])


def _freedom(group: Group) -> str:
    return f"free, {group.structure}" if group.free else f"pinned by {'; '.join(group.pinned_by)}"


@show.register(Mapping)
def show_statistics(
    statistics: Mapping[str, Statistics], names: Mapping[str, str] | None = None
) -> str:
    """What calibration saw, one linear a line, by name."""
    return _lines(f"{name}: {_statistics(statistics[name])}" for name in sorted(statistics))


def _statistics(seen: Statistics) -> str:
    moment = seen.second_moment
    spread = "none"
    if moment.numel():
        low, middle, high = (float(m) for m in (moment.min(), moment.median(), moment.max()))
        spread = f"{low:.3e} | {middle:.3e} | {high:.3e}"
    held_out = f"{len(seen.held_out):,} held out"
    return (
        f"{moment.numel():,} channels, {seen.rows:,} rows, "
        f"second moment min | median | max {spread}; "
        f"{len(seen.fit):,} rows to fit, {held_out} by {seen.held_out_by}"
    )


@show.register
def show_plan(plan: Plan, names: Mapping[str, str] | None = None) -> str:
    """Recipe, then every linear, every verdict, every order, each with its reason."""
    return _lines(
        [
            f"recipe {plan.recipe}, format {plan.format}",
            "",
            "linears",
            *(_wrapped(f"  {linear_line(linear)}") for linear in plan.linears),
            "",
            "groups",
            *(_wrapped(f"  {verdict_line(verdict)}") for verdict in plan.verdicts),
            "",
            "orders",
            *(f"  leaf {leaf}: {order_line(plan.orders[leaf])}" for leaf in sorted(plan.orders)),
        ]
    )


def linear_line(planned: LinearPlan) -> str:
    linear = planned.linear
    parts = [
        f"{linear.name}: {linear.in_features} -> {linear.out_features}",
        planned.route
        if planned.bits_per_weight is None
        else f"{planned.route} at {planned.bits_per_weight:.3g} bits per weight",
        *_errors(planned.error_before, planned.error_after),
    ]
    if planned.group is not None:
        state = "reordered" if planned.accepted else "free" if planned.free else "pinned"
        parts.append(f"{state} in {planned.group}")
    return f"{', '.join(parts)}{reason(planned.reason)}"


def verdict_line(verdict: Verdict) -> str:
    parts = [
        f"{verdict.group}: {'accepted' if verdict.accepted else 'refused'}",
        *_errors(verdict.error_before, verdict.error_after),
        *([] if verdict.alpha is None else [f"alpha {verdict.alpha:g}"]),
    ]
    return f"{', '.join(parts)}{reason(verdict.reason)}"


def order_line(order: Permutation) -> str:
    """The first channels and a checksum of all: ``4 channels [2 0 1 3], crc32 9af1c2d0``."""
    return f"{len(order)} channels {order}, crc32 {zlib.crc32(repr(order.order).encode()):08x}"


def reason(text: str) -> str:
    return f"; {text}" if text else ""


def error(value: float | None) -> str:
    """A relative squared error to four digits; ``-`` where none was measured."""
    return "-" if value is None else f"{value:.4g}"


def _errors(before: float | None, after: float | None) -> list[str]:
    if before is None and after is None:
        return []
    return [f"error {error(before)} -> {error(after)}"]


def _wrapped(line: str) -> str:
    """``line`` on lines of at most 100 columns, continuations indented; names stay whole."""
    if len(line) <= WIDTH:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    return "\n".join(
        textwrap.wrap(
            line.strip(),
            WIDTH,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
