"""What Dynamo calls in place of a captured graph: observes, then serves the lowered graph.

Parameters stay inputs. At each call the arguments are matched with a *binding*: the parameters this
graph is being run with, and the unit they belong to. One compiled graph so serves every block of a
kind, a second instance of a class, and weights that have changed.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from . import progress
from .bindings import Binding, Serving, Source, look_up, pick
from .errors import Refused
from .needs import Needs
from .options import Options
from .released import last_change
from .unit import OWNERS, Passes, Unit

HELD: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> number of calibrations around it that end only when the user says so."""

TAKEN_OVER = (
    "permuquant: this model was compiled before with other options; from now on its weights follow "
    "these, and the earlier compiled model observes anew if it is called again. To use both, "
    "compile copy.deepcopy(model)"
)

_LOCK = threading.RLock()


@dataclass(frozen=True)
class Site:
    """A tensor that calibration observes: the linears at these argument indices read it."""

    node: fx.Node
    weights: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A captured graph, analysed and lowered; nothing of it depends on a parameter's values."""

    module: fx.GraphModule
    lowered: fx.GraphModule
    sources: tuple[Source, ...]  # of each lowered input
    parameters: Mapping[int, str]  # argument -> name in the user's model
    inputs: Mapping[int, str]  # other tensor arguments -> name
    sites: tuple[Site, ...]
    needs: Needs


class CompiledGraph:
    """The callable that stands for one captured graph."""

    def __init__(
        self,
        program: Program,
        options: Options,
        passes: Passes,
        compiled: Callable[..., Any] | None,
    ) -> None:
        self.program = program
        self.options = options
        self.passes = passes
        self.compiled = compiled  # of the lowered graph; None while weights are yet to be released
        self._parameters = pick(tuple(program.parameters))
        self._anchor = torch.empty(0)  # the first parameter of a graph without any
        self._bindings: dict[int, tuple[Binding, ...]] = {}  # id of the first parameter -> bindings
        self._local = threading.local()
        self._observed = _observed(program, self._record)

    def __call__(self, *args: Any) -> Any:
        change = last_change()
        binding = self.bind(args)
        serving: Serving | None = binding.unit.serving.get(binding)
        if serving is None or not serving.fresh(args):
            if not binding.unit.frozen:
                observed = self._observe(binding, args)
                if observed is not None:
                    return observed
            serving = self._look_up(binding, args)
            if change is not last_change():  # a weight came back, not laid out as compiled for
                return self.program.lowered(*serving.inputs(args))
        run = self.compiled or self.program.lowered
        return run(*serving.inputs(args))

    # ---------------------------------------------------------------- binding

    def bind(self, args: tuple[Any, ...]) -> Binding:
        """The binding of these arguments, made on their first call."""
        parameters = self._parameters(args)
        anchor = parameters[0] if parameters else self._anchor
        for binding in self._bindings.get(id(anchor), ()):
            if binding.matches(parameters):
                return binding
        with _LOCK:
            binding = self._new_binding(args)
            alive = [one for one in self._bindings.get(id(anchor), ()) if one.alive]
            self._bindings[id(anchor)] = (binding, *alive)
            return binding

    def _new_binding(self, args: Sequence[Any]) -> Binding:
        tensors = {i: args[i] for i in self.program.parameters}
        owners = dict.fromkeys(OWNERS[t][0] for t in tensors.values() if t in OWNERS)
        unit = self._joint_unit(list(owners))
        names = {
            i: OWNERS[tensor][1]
            if tensor in OWNERS
            else unit.adopt(tensor, self.program.parameters[i])
            for i, tensor in tensors.items()
        }
        renames = {self.program.parameters[i]: name for i, name in names.items()}
        unit.join(self.program.needs.renamed(renames, self.passes.rename))
        return Binding(unit, names, self._references(tuple(tensors.values())))

    def _references(self, parameters: tuple[Tensor, ...]) -> tuple[weakref.ref[Tensor], ...]:
        """Weak references; as the first parameter dies, so do the bindings that start with it."""
        if not parameters:
            return ()
        this, first = weakref.ref(self), id(parameters[0])

        def forget(_: weakref.ref[Tensor]) -> None:
            graph = this()
            if graph is not None:
                graph._bindings.pop(first, None)

        return weakref.ref(parameters[0], forget), *map(weakref.ref, parameters[1:])

    def _joint_unit(self, owners: list[Unit]) -> Unit:
        """The one unit of these parameters; units that meet in a graph are observed anew as one."""
        alike = [unit for unit in owners if unit.options == self.options]
        if len(owners) == len(alike) == 1:
            return alike[0]
        joint = Unit(self.options, self.passes)
        for unit in owners:
            unit.thaw()
            renames = {
                name: joint.adopt(tensor, name) for name, tensor in unit.parameters().items()
            }
            if unit in alike:
                joint.join(unit.needs.renamed(renames, self.passes.rename))
            else:
                warnings.warn(TAKEN_OVER, RuntimeWarning, stacklevel=2)
            unit.merged_away = True
            progress.done(unit)
        return joint

    # ---------------------------------------------------------------- observe

    def _observe(self, binding: Binding, args: Sequence[Any]) -> Any:
        """Answer in the model's own precision and learn; None once the unit is frozen."""
        unit = binding.unit
        with unit.lock:
            if unit.frozen:
                return None
            held = any(ref() in HELD and HELD[ref()] for ref in binding.references[:1])
            if unit.ready and unit.options.observed_calls == 0 and not held and self._freeze(unit):
                return None
            if unit.failure is not None:
                return self.program.module(*args)
            unit.observer.begin_call({name: args[i] for i, name in self.program.inputs.items()})
            self._local.binding = binding
            try:
                out = self._observed(*args)
            finally:
                self._local.binding = None
            unit.observer.end_call()
            unit.calls += 1
            if unit.options.progress:
                progress.observed(unit, unit.options.observed_calls if not held else None)
            if unit.ready and not held:
                self._freeze(unit)
            return out

    def _record(self, x: Tensor, site: int) -> None:
        binding: Binding = self._local.binding
        weights = [binding.names[i] for i in self.program.sites[site].weights]
        binding.unit.observer.observe(x, weights)

    def _freeze(self, unit: Unit) -> bool:
        try:
            unit.freeze()
            return True
        except Refused:
            raise
        except Exception as error:
            unit.failure = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"permuquant: freezing failed ({unit.failure}); the model goes on in its own "
                "precision. Call pq_compile.freeze(model) to try again.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        finally:
            progress.done(unit)

    # ---------------------------------------------------------------- serve

    def _look_up(self, binding: Binding, args: tuple[Any, ...]) -> Serving:
        with binding.unit.lock:
            serving = look_up(binding, self.program.sources, args)
            binding.unit.serving[binding] = serving
            return serving


def _observed(program: Program, record: Callable[[Tensor, int], None]) -> fx.GraphModule:
    """A copy of the captured graph that hands every site's tensor to ``record``; run eagerly."""

    def observe(x: Tensor, site: int) -> None:  # an fx target must be a function with a name
        record(x, site)

    sites = {site.node: i for i, site in enumerate(program.sites)}
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in program.module.graph.nodes:
        new[node] = graph.node_copy(node, lambda old: new[old])
        if node in sites:
            graph.call_function(observe, (new[node], sites[node]))
    return fx.GraphModule(program.module, graph)
