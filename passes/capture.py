"""Dynamo's graph, with its parameters under the user's names and its linears listed.

Beside it stands a *view*: the same computation in ATen ops before dispatch, where ``linear``,
``layer_norm`` and ``scaled_dot_product_attention`` are still themselves and every op has one
spelling. The analysis reads the view; Dynamo's graph is the one that will be rewritten.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from pq_compile.plan import Linear

LINEAR = (F.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
TAG = "permuquant"  # where a node of the view names its node in Dynamo's graph
NOT_LOWERED = {
    "multi_head_attention_forward": "its projections are inside multi_head_attention_forward",
    "conv1d": "it is a convolution",
    "conv2d": "it is a convolution",
    "conv3d": "it is a convolution",
    "bilinear": "it is a bilinear form",
    "addmm": "it multiplies by a parameter outside a linear",
    "baddbmm": "it multiplies by a parameter outside a linear",
    "matmul": "it multiplies by a parameter outside a linear",
    "mm": "it multiplies by a parameter outside a linear",
    "einsum": "it multiplies by a parameter outside a linear",
}


@dataclass(frozen=True)
class Graph:
    """What one call of the backend received, named."""

    module: fx.GraphModule  # Dynamo's graph
    view: fx.GraphModule | None  # its ATen form, read by the analysis; None where tracing failed
    view_error: str | None  # why there is no view
    parameters: Mapping[str, str]  # placeholder name -> name in the user's model, buffers included
    positions: Mapping[str, int]  # name -> index of its placeholder
    linears: tuple[Linear, ...]  # in graph order; those whose weight is a parameter
    nodes: Mapping[str, str]  # Dynamo node name of a linear -> its Linear.name
    kept: Mapping[str, str]  # node that looks like a linear but is not lowered -> why


def capture(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Graph:
    """Name the parameters and linears of Dynamo's graph, and trace its view.

    ``example_inputs`` are those Dynamo hands the backend. No guard is added to Dynamo's shapes.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    parameters = _parameter_names(placeholders, example_inputs)
    positions = {
        parameters[node.name]: index
        for index, node in enumerate(placeholders)
        if node.name in parameters
    }
    calls = [node for node in module.graph.nodes if _parameter_of(node, parameters)]
    high = any(_rank(node) > 2 for node in calls)
    described = [_linear(node, parameters, high) for node in calls]
    view, view_error = _trace(module, placeholders, parameters)
    return Graph(
        module=module,
        view=view,
        view_error=view_error,
        parameters=parameters,
        positions=positions,
        linears=tuple(described),
        nodes={node.name: line.name for node, line in zip(calls, described, strict=True)},
        kept=_kept(module, parameters),
    )


# ---------------------------------------------------------------- names


PRIVATE = {"_modules", "_parameters", "_buffers", "__dict__"}


def source_of(node: fx.Node) -> str:
    """Where Dynamo found a placeholder's value, ``L['x']``; older torch has a method ``name``."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name or node.name)


def user_path(source: str) -> str:
    """``L['self']._modules['up']._parameters['weight']`` -> ``up.weight``.

    Without the private dictionaries, ``L['self'].up.weight``, it is the same.
    """
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", source)
    path = [quoted or index or plain for quoted, index, plain in parts]
    return ".".join(part for part in path[1:] if part not in PRIVATE)


def _parameter_names(placeholders: Sequence[fx.Node], inputs: Sequence[Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    taken: set[str] = set()
    for node, value in zip(placeholders, inputs, strict=True):
        source = source_of(node)
        known = re.search(r"\b_parameters\b|\b_buffers\b", source) or _is_parameter(value)
        if isinstance(value, Tensor) and known:
            names[node.name] = _distinct(user_path(source) or node.name, taken)
    return names


def _is_parameter(value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter | torch.nn.Buffer)


def _distinct(name: str, taken: set[str]) -> str:
    """``name``, or ``name#2`` and so on where two things would share it."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}#{count}"
    taken.add(unique)
    return unique


# ---------------------------------------------------------------- linears


def _argument(node: fx.Node, index: int, name: str) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name)


def _parameter_of(node: fx.Node, parameters: Mapping[str, str]) -> str | None:
    """The name of a linear's weight if it is a parameter as it stands."""
    if node.op != "call_function" or node.target not in LINEAR:
        return None
    weight = _argument(node, 1, "weight")
    return parameters.get(weight.name) if isinstance(weight, fx.Node) else None


def _rank(node: fx.Node) -> int:
    return len(_shape(_argument(node, 0, "input")))


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return tuple(map(_hint, value.shape)) if isinstance(value, Tensor) else ()


def _hint(size: Any) -> int:
    """The size Dynamo saw, without a guard; 1 for a size that only exists at run time."""
    if isinstance(size, torch.SymInt):
        hint = getattr(size.node, "hint", None)
        return int(hint) if isinstance(hint, int) else 1
    return int(size)


def _linear(node: fx.Node, parameters: Mapping[str, str], high: bool) -> Linear:
    x, weight, bias = (
        _argument(node, i, name) for i, name in enumerate(("input", "weight", "bias"))
    )
    name = parameters[weight.name]
    out_features, in_features = _shape(weight)
    shape = _shape(x)
    return Linear(
        name=re.sub(r"\.weight(?=#|$)", "", name),
        weight=name,
        bias=parameters.get(bias.name) if isinstance(bias, fx.Node) else None,
        in_features=in_features,
        out_features=out_features,
        rows=math.prod(shape[:-1]),
        per_sample=high and len(shape) == 2,
        reads=x.name,
    )


def _kept(module: fx.GraphModule, parameters: Mapping[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    for node in module.graph.nodes:
        what = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and node.target in LINEAR:
            if not _parameter_of(node, parameters):
                kept[node.name] = "its weight is computed in the graph"
        elif what in NOT_LOWERED and any(n.name in parameters for n in node.all_input_nodes):
            kept[node.name] = NOT_LOWERED[what]
    return kept


# ---------------------------------------------------------------- the view


def _trace(
    module: fx.GraphModule, placeholders: Sequence[fx.Node], parameters: Mapping[str, str]
) -> tuple[fx.GraphModule | None, str | None]:
    """Dynamo's graph interpreted on its own fake values, each node of the result tagged.

    NOTE: ``tracing(None)`` keeps make_fx out of Dynamo's context, where it would add to the shape
    environment; the fake mode is that of the values, which is not the context's.
    """
    for node in module.graph.nodes:
        node.meta["custom"] = {**node.meta.get("custom", {}), TAG: node.name}
    values = [node.meta.get("example_value") for node in placeholders]
    modes = (getattr(value, "fake_mode", None) for value in values)
    mode = next((mode for mode in modes if mode is not None), nullcontext())
    try:
        with tracing(None), preserve_node_meta(), mode:
            view = make_fx(fx.Interpreter(module).run, pre_dispatch=True)(*values)
    except Exception as error:  # whatever fails here costs freedom, never correctness
        text = str(error).strip().partition("\n")[0]
        return None, f"a graph that could not be traced to ATen ({type(error).__name__}: {text})"
    lost = _lost(view, module, parameters)
    if lost:
        return None, f"a graph that could not be traced to ATen past {lost}"
    return view, None


def _lost(view: fx.GraphModule, module: fx.GraphModule, parameters: Mapping[str, str]) -> str:
    """Where the view first takes for a constant what depends on a parameter; "" if nowhere.

    make_fx stores as a constant whatever it cannot follow, such as all that happens in a ``vmap``.
    """
    depends: dict[str, bool] = {}
    for node in module.graph.nodes:
        reads = any(depends[one.name] for one in node.all_input_nodes)
        depends[node.name] = reads or node.name in parameters
    for constant in view.graph.find_nodes(op="get_attr"):
        reader = constant.meta.get("custom", {}).get(TAG, "")
        if _is_traced(getattr(view, constant.target)) and depends.get(reader, True):
            return f"node {reader}" if reader else "its last node"
    return ""


def _is_traced(value: Any) -> bool:
    """A value of the trace; a constant of the user's is none."""
    wrapped = isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)
    return wrapped or isinstance(value, FakeTensor)
