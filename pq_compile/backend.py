"""The backend: the whole pipeline, as one straight function.

    capture -> propagate -> (observe, at call time) -> accept -> fold -> lower -> serve

Graphs are analysed and lowered when Dynamo hands them over; statistics, plan and packed weights
follow at call time, in ``unit``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import passes.accept
import passes.calibrate
import passes.capture
import passes.constraints
import passes.fold
import passes.groups
import passes.join
import passes.lower
import passes.policy
import passes.propagate
import passes.reorder
import passes.revise
import passes.simplify
import passes.storage
import passes.teams

from . import ops  # registers the operators of the lowered graph
from .compiling import compile_lowered
from .dump import Dump
from .errors import Refused
from .frames import is_whole_model
from .needs import Needs
from .options import Options
from .plan import Groups
from .released import releasable
from .routes import Route, choose, here, settle_for
from .runtime import CompiledGraph, Program, Site
from .show import show
from .trail import dump_frozen, numbered
from .unit import OWNERS, Passes

log = logging.getLogger(__name__)

# One graph observes and one serves, per resolution and kind of block; Dynamo's default of 8 graphs
# per function would silently leave the ninth uncompiled.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)

# While one thread traces, some versions refuse every compiled call of the others; let those run
# uncompiled instead, which is the model's own precision.
torch._dynamo.config.error_on_nested_fx_trace = False

# A released weight must fail its guards, so that its graph is compiled anew; these shortcuts, on in
# some versions, look at the dict that holds a parameter and not at the parameter.
for shortcut in (
    "use_recursive_dict_tags_for_guards",
    "skip_tensor_guards_with_matching_dict_tags",
):
    if hasattr(torch._dynamo.config, shortcut):
        setattr(torch._dynamo.config, shortcut, False)

PASSES = Passes(
    observer=passes.calibrate.Observer,
    merge=passes.propagate.merge,
    rename=passes.propagate.rename,
    extend=passes.propagate.extend,
    plan=passes.accept.accept,
    fold=passes.fold.fold,
    revise=passes.revise.revise,
    nothing_to_quantise=passes.policy.nothing_to_quantise,
    frozen=dump_frozen,
)


def permuquant(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="permuquant")`` calls for every captured graph.

    ``mode`` is Inductor's (GPU only), and so is the option of that name, as ``torch.compile`` takes
    no ``mode`` beside ``options``; those are of ``pq_compile.options.Options``.
    Raises ``Refused`` for an unknown option, training, autocast, weights on the meta device, and a
    whole model without a linear that can be quantised.
    """
    parsed = Options.parse(options)
    _refuse_what_is_not_inference(example_inputs)
    analysis = analyse(module, example_inputs, parsed)
    needs = analysis.program.needs
    nothing = passes.policy.nothing_to_quantise(needs.linears, needs.kept, parsed)
    if nothing is not None and is_whole_model():
        raise Refused(nothing)
    _dump(numbered(parsed.dump, "graph"), analysis)
    compiled = None
    if not _releases_later(analysis, example_inputs, parsed):
        inputs = _lowered_inputs(analysis, example_inputs, parsed)
        compiled = compile_lowered(analysis.program, inputs, parsed, mode or parsed.mode)
    return CompiledGraph(analysis.program, parsed, PASSES, compiled)


@dataclass(frozen=True)
class Analysis:
    """All that can be known of a graph without running it."""

    graph: passes.capture.Graph
    rows: passes.propagate.Rows
    lowered: passes.lower.Lowered
    program: Program
    weight_bytes: Mapping[str, int]  # of each parameter


def analyse(module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Analysis:
    """Capture, propagate and lower one graph."""
    graph = passes.simplify.captured(module, example_inputs)
    graph = replace(graph, kept={**graph.kept, **passes.storage.written_parameters(graph)})
    log.debug("capture: %d nodes, %d linears", len(module.graph.nodes), len(graph.linears))
    rows = passes.propagate.spread(graph, example_inputs)
    groups = passes.groups.gather(rows)
    free = sum(group.free for group in groups.groups)
    log.debug("propagate: %d groups, %d of them free", len(groups.groups), free)
    by_name = {name: example_inputs[i] for name, i in graph.positions.items()}
    options = settle_for(options, graph.linears, by_name)
    how = schemes(graph, options), options.format, route(graph, options, by_name), options.route
    lowered = passes.lower.lower(graph.module, *how)
    passes.join.join(lowered.module)
    log.debug("lower: %d weights wanted packed", len(lowered.packed))
    program = _program(graph, groups, lowered, example_inputs)
    sizes = {name: example_inputs[i].nbytes for i, name in program.parameters.items()}
    return Analysis(graph, rows, lowered, program, sizes)


def route(
    graph: passes.capture.Graph, options: Options, parameters: Mapping[str, Tensor]
) -> Route | None:
    """How the linears of the settled scheme are multiplied; None where nothing may be moved.

    In a graph that writes to a tensor, what a linear reads may change before it does.
    """
    weights = [parameters[one.weight] for one in graph.linears]
    if not weights or graph.view is None or passes.storage.written(graph.view):
        return None
    where = here(weights[0].device, options.format, weights[0].dtype)
    return choose(options.scheme, where, options.route)


def schemes(graph: passes.capture.Graph, options: Options) -> dict[str, str]:
    """Node name -> scheme of every linear that is quantised."""
    route_of = passes.policy.route_of
    by_name = {one.name: route_of(one, options, graph.kept)[0] for one in graph.linears}
    by_node = {node: by_name[name] for node, name in graph.nodes.items()}
    return {node: route for node, route in by_node.items() if route != "keep"}


def _refuse_what_is_not_inference(example_inputs: Sequence[Any]) -> None:
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise Refused(
            "permuquant: this is an inference backend, and the model was called with gradients "
            "enabled; call it under torch.no_grad() or torch.inference_mode(), or freeze its "
            "parameters with model.requires_grad_(False)"
        )
    for device in dict.fromkeys(tensor.device.type for tensor in tensors):
        if device != "meta" and torch.is_autocast_enabled(device):
            raise Refused(
                f"permuquant: autocast is on for {device!r}; cast the model instead, for example "
                "model.to(torch.bfloat16), and call it outside torch.autocast"
            )
    if any(tensor.is_meta for tensor in tensors):
        raise Refused(
            "permuquant: the model or its inputs are on the meta device; load real weights first "
            "(pq_compile.explain works on meta tensors)"
        )


def _releases_later(analysis: Analysis, example_inputs: Sequence[Any], options: Options) -> bool:
    """Whether a weight will be released, which fails the guards and brings the graph back here."""
    needs, names = analysis.program.needs, analysis.program.parameters

    def read_as_it_is(index: int) -> bool:
        weight = example_inputs[index]
        others = [OWNERS[weight]] if weight in OWNERS else []  # the graphs seen before
        return names[index] in needs.dense or any(name in u.needs.dense for u, name in others)

    return options.release_weights != "keep" and any(
        releasable(example_inputs[i]) and not read_as_it_is(i) for i in analysis.lowered.packed
    )


def _program(
    graph: passes.capture.Graph,
    groups: Groups,
    lowered: passes.lower.Lowered,
    example_inputs: Sequence[Any],
) -> Program:
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    parameters = {graph.positions[name]: name for name in graph.parameters.values()}
    inputs = {
        i: node.name.removeprefix("l_").removesuffix("_")
        for i, node in enumerate(placeholders)
        if i not in parameters and isinstance(example_inputs[i], Tensor)
    }
    dense = {source.argument for source in lowered.sources if source.field is None}
    needs = Needs(
        groups,
        passes.reorder.one_per_weight(graph.linears),
        graph.kept,
        frozenset(parameters[i] for i in lowered.packed),
        frozenset(name for i, name in parameters.items() if i in dense),
    )
    sites = _sites(graph, lowered)
    return Program(graph.module, lowered.module, lowered.sources, parameters, inputs, sites, needs)


def _sites(graph: passes.capture.Graph, lowered: passes.lower.Lowered) -> tuple[Site, ...]:
    """The tensors that quantised linears read, each with the weights that read it."""
    placeholders = graph.module.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    readers: dict[fx.Node, list[int]] = {}
    for node in graph.module.graph.nodes:
        if node.name in graph.nodes:
            x, weight, _ = passes.teams.operands(node)
            if index[weight] in lowered.packed:
                readers.setdefault(x, []).append(index[weight])
    return tuple(Site(node, tuple(dict.fromkeys(weights))) for node, weights in readers.items())


def _lowered_inputs(
    analysis: Analysis, example_inputs: Sequence[Any], options: Options
) -> list[Any]:
    """One per input of the lowered graph: Dynamo's own, and fake packed tensors."""
    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context else None
    return passes.lower.example_inputs(analysis.lowered, example_inputs, options.format, mode)


def _dump(dump: Dump, analysis: Analysis) -> None:
    if dump.folder is None:
        return
    names = analysis.graph.parameters
    packed = {
        f"{node}{field}": f"{name}.{field}"
        for node, name in names.items()
        for field in passes.lower.FIELDS
    }
    dump.write("00_capture", show(analysis.graph.module, names))
    dump.write("01_groups", show(analysis.program.needs.groups))
    dump.write("01_pins", passes.constraints.every_pin(analysis.rows))
    dump.write("05_lowered", show(analysis.lowered.module, {**names, **packed}))


__all__ = ["PASSES", "ops", "permuquant"]
