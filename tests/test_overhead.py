"""What a call costs beside the compiled graph; ``python -m tests.test_overhead`` prints it."""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pq_compile.backend import PASSES
from pq_compile.entries import Entry
from pq_compile.needs import Needs
from pq_compile.options import Options
from pq_compile.plan import Plan
from pq_compile.released import release, staleness_key
from pq_compile.runtime import CompiledGraph, Program

Sizes = tuple[int, int, int]
"""Parameters; how many of them are packed and released; how many others have reordered copies."""

SIZES: dict[str, Sizes] = {
    "emoji-flux": (132, 62, 35),
    "FLUX.1-dev": (1160, 504, 0),
    "FLUX.1-dev, every order taken": (1160, 504, 330),
}


def served(sizes: Sizes) -> tuple[CompiledGraph, tuple[Any, ...]]:
    """A frozen graph of that many parameters and two inputs that computes nothing, and its call."""
    count, packed, copied = sizes
    parameters = [nn.Parameter(torch.zeros(2, 2), requires_grad=False) for _ in range(count)]
    args = (torch.zeros(3), *parameters[: count // 2], torch.zeros(3), *parameters[count // 2 :])
    names = {i: f"p{i}" for i, value in enumerate(args) if isinstance(value, nn.Parameter)}
    order = [*list(names)[::2], *list(names)[1::2]]
    weights, others = order[:packed], order[packed : packed + copied]
    sources = [(i, None) for i in range(len(args)) if i not in weights]
    fields = [(i, field) for i in weights for field in range(3)]
    graph = fx.GraphModule({}, fx.Graph())
    program = Program(graph, graph, (*sources, *fields), names, {}, (), Needs())
    options = replace(Options(), recipe="rtn")
    compiled = CompiledGraph(program, options, PASSES, lambda *inputs: inputs)
    unit = compiled.bind(args).unit
    unit.plan = Plan("rtn", "nvfp4", ())
    for i in (*weights, *others):
        if i in weights:
            release(args[i], names[i], keep_backup=False)
        unit._entries[names[i]] = _entry(args[i], i in weights)
    return compiled, args


def _entry(tensor: Tensor, packed: bool) -> Entry:
    with torch._C.DisableTorchFunctionSubclass():
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        fields = (torch.zeros(1), torch.zeros(1), torch.zeros(1)) if packed else None
        return Entry(fields, None if packed else tensor.clone(), staleness_key(tensor), storage)


def best(call: Callable[..., Any], args: tuple[Any, ...], number: int = 100) -> float:
    """Microseconds of one call, the least of several measurements."""
    return min(timeit.repeat(lambda: call(*args), number=number, repeat=5)) / number * 1e6


def python_steps(call: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """How many functions Python code calls, its own and C's."""
    steps = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call(*args)
    finally:
        sys.setprofile(before)
    return steps


@pytest.mark.parametrize("copied", [0, 20])
def test_a_call_takes_as_many_steps_for_many_parameters_as_for_few(copied: int) -> None:
    taken = []
    for count in (60, 600):
        graph, args = served((count, count // 2, copied))
        graph(*args)
        taken.append(python_steps(graph, args))
    assert taken[0] == taken[1]


@pytest.mark.parametrize("name", SIZES)
def test_a_call_costs_little_more_than_looking_at_each_parameter_once(name: str) -> None:
    graph, args = served(SIZES[name])
    inputs = graph(*args)
    assert len(inputs) == len(args) + 2 * SIZES[name][1]

    def look(*values: Any) -> None:
        for value in values:
            id(value)

    assert best(graph, args, 20) < 15 * best(look, args, 20)


def main() -> None:
    for name, sizes in SIZES.items():
        graph, args = served(sizes)
        graph(*args)
        print(f"{name:32}{sizes!s:18}{best(graph, args):8.1f} us")


if __name__ == "__main__":
    main()
