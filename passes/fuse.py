"""Find what can be computed while a row is quantised: the chain of elementwise ops and row
reductions that ends in a tensor which quantised linears read.

A chain grows backwards from that tensor through the nodes that ``meanings`` describes, as long as
nobody who comes earlier needs what lies within. A value that somebody reads later on, such as the
residual stream, is computed by the chain and written as well. What is not described is an input of
the chain and Inductor's to compute: silence ends a chain.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from pq_compile.rows import OPS, Input, Kept, Program, Step, Target

from .meanings import LAST, steps_of

MOST_INPUTS, MOST_STEPS = 8, 48
WIDEST = 32768
GROUP = 16

Readers = Mapping[fx.Node, Collection[fx.Node]]
"""A tensor that is to be quantised -> the linears that read it so."""


@dataclass(frozen=True)
class Chain:
    """The program that computes and quantises ``root``, its inputs, and the values it keeps."""

    root: fx.Node
    program: Program
    inputs: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]  # what it computes, in order


def chains(module: fx.GraphModule, readers: Readers, target: Target) -> dict[fx.Node, Chain]:
    """A chain for every tensor [T, K] or [B, T, K] of ``readers`` that can have one.

    None for a K that is no multiple of 16 or beyond ``WIDEST``.
    """
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    found: dict[fx.Node, Chain] = {}
    taken: set[fx.Node] = set()
    for root in sorted(readers, key=place.__getitem__):
        if len(_shape(root)) not in (2, 3) or not _fits(root):
            continue
        chain = _grown(root, place, taken, readers[root]).chain(target)
        if len(chain.inputs) > MOST_INPUTS or len(chain.program.steps) > MOST_STEPS:
            chain = _grown(root, place, set(place), readers[root]).chain(target)
        taken.update(chain.kept)
        found[root] = chain
    return found


def _grown(
    root: fx.Node,
    place: Mapping[fx.Node, int],
    taken: Collection[fx.Node],
    readers: Collection[fx.Node],
) -> _Growth:
    """What has grown from ``root`` without the nodes that ``taken`` rules out, and without those
    that no program can compute.
    """
    growth = _Growth(root, place, taken, readers)
    while stuck := growth.stuck():
        taken = stuck | set(taken)
        growth = _Growth(root, place, taken, readers)
    return growth


class _Growth:
    """One chain while it grows: ``inside`` are the nodes that it computes."""

    def __init__(
        self,
        root: fx.Node,
        place: Mapping[fx.Node, int],
        taken: Collection[fx.Node],
        readers: Collection[fx.Node],
    ) -> None:
        self.root, self.place, self.taken, self.readers = root, place, taken, readers
        self.lead = _shape(root)[:-1]
        self.parts = _parts(root) if all(user in readers for user in root.users) else (root,)
        self.inside: set[fx.Node] = {root} if len(self.parts) > 1 else set()
        self.width = {part: _shape(part)[-1] for part in self.parts}
        waiting = set(self.parts)
        while waiting:  # the latest first: then all users of a node are decided before it
            node = max(waiting, key=place.__getitem__)
            waiting.remove(node)
            if self._computes(node):
                self.inside.add(node)
                for operand in _operands(node):
                    self.width.setdefault(operand, self.width[node])
                    waiting.add(operand)

    def _computes(self, node: fx.Node) -> bool:
        """Whether the chain may compute ``node``: nobody outside needs it before the root is."""
        operands = _operands(node)
        if not operands or node in self.taken or self._kind(node) is None:
            return False
        if any(self._kind(one, self.width[node]) is None for one in operands):
            return False
        late = len(self.place) if _is_number(node) else self.place[self.root]
        free = all(user in self.inside or self.place[user] > late for user in node.users)
        return free or self._kind(node) == "sample"

    def stuck(self) -> set[fx.Node]:
        """Nodes inside that read a number for every row from outside, or reduce one."""
        return {
            node
            for node in self.inside
            for one in _operands(node)
            if _is_number(one) and (one not in self.inside or _reduces(node))
        }

    def _kind(self, node: fx.Node, width: int | None = None) -> Literal["row", "sample"] | None:
        """How a program of this width can read or compute ``node``; None if it can't.

        ``row``: a value for every channel of every row, or a number for every row, which only a
        step can make; ``sample``: one for every channel, the same for all rows of a sample.
        """
        width, shape = width or self.width[node], _shape(node)
        if not 0 < len(shape) <= len(self.lead) + 1 or not _is_floating(node):
            return None
        *given, last = shape
        if len(given) == len(self.lead) and all(map(_equal, given, self.lead)):
            made = _equal(last, 1) and bool(_operands(node))
            return "row" if _equal(last, width) or made else None
        padded = [1] * (len(self.lead) - len(given)) + given
        shared = _equal(padded[-1], 1) and all(
            _equal(a, b) or _equal(a, 1) for a, b in zip(padded, self.lead, strict=True)
        )
        return "sample" if shared and _equal(last, width) else None

    def chain(self, target: Target) -> Chain:
        """The program of what has grown."""
        joined = len(self.parts) > 1
        order = sorted(self.inside, key=self.place.__getitem__)
        order = [node for node in order if not (joined and node is self.root)]
        read = [operand for node in order for operand in _operands(node)]
        inputs = [one for one in dict.fromkeys([*read, *self.parts]) if one not in self.inside]
        number = {node: i for i, node in enumerate(inputs)}
        steps: list[Step] = []
        for node in order:
            value: Any = None
            for op, operands in steps_of(node) or ():
                given: list[Any] = [value if o is LAST else number.get(o, o) for o in operands]
                if op == "same":
                    value = given[0]
                    continue
                numbers = (
                    g if o is LAST or isinstance(o, fx.Node) else float(g)
                    for o, g in zip(operands, given, strict=True)
                )
                steps.append(Step(op, tuple(numbers)))
                value = len(inputs) + len(steps) - 1
            number[node] = value
        kept = [node for node in order if self._is_read_later(node)]
        program = Program(
            tuple(Input(self._kind(one) or "row", _shape(one)[-1]) for one in inputs),
            tuple(steps),
            tuple(Kept(number[node], node.meta["example_value"].dtype) for node in kept),
            tuple(number[part] for part in self.parts),
            target,
        )
        inside = tuple(sorted(self.inside, key=self.place.__getitem__))
        return Chain(self.root, program, tuple(inputs), tuple(kept), inside)

    def _is_read_later(self, node: fx.Node) -> bool:
        """Whether something outside reads a row that the chain computes."""
        users = set(node.users) - self.inside
        return self._kind(node) == "row" and bool(users - set(self.readers))


def _operands(node: fx.Node) -> list[fx.Node]:
    found = [o for _, operands in steps_of(node) or () for o in operands]
    return [o for o in dict.fromkeys(found) if isinstance(o, fx.Node)]


def _is_number(node: fx.Node) -> bool:
    """Whether it holds one number for every row."""
    return bool(_shape(node)) and _equal(_shape(node)[-1], 1)


def _reduces(node: fx.Node) -> bool:
    return any(not OPS[op].text for op, _ in steps_of(node) or () if op in OPS)


def _parts(root: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that ``root`` lays side by side, each of whole groups; else itself."""
    if root.op == "call_function" and root.target in (torch.cat, torch.concat):
        given: dict[str, Any] = {"dim": 0}
        given |= dict(zip(("tensors", "dim"), root.args, strict=False)) | dict(root.kwargs)
        parts = given["tensors"]
        if given["dim"] in (-1, len(_shape(root)) - 1) and all(map(_fits, parts)):
            return tuple(parts)
    return (root,)


def _fits(node: fx.Node) -> bool:
    shape = _shape(node)
    known = bool(shape) and isinstance(shape[-1], int)
    return known and 0 < shape[-1] <= WIDEST and shape[-1] % GROUP == 0


def _equal(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; of symbolic ones, without a guard, if they are spelled so."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_floating_point()


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()
