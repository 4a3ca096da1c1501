"""Which of the observed calls a recipe is fitted to, and which it is judged on.

Calls of one prompt are alike, so rows held out among them flatter whoever was fitted to the rest: a
*run*, all calls with the same conditioning, goes to one side as a whole. Inputs that condition are
found by how their contents come back: a prompt within a few calls, time after time, also where the
empty prompt alternates with it; latents and, inside a block, activations never or, for guidance,
once; timesteps only after the whole schedule; position ids never change.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Contents = dict[str, int]
"""Input -> a number that stands for what it held in a call; equal numbers, equal contents."""

HeldOutBy = Literal["run", "call", "none"]

SHARE = 4
"""One of so many runs, calls or rows is held out."""

NEAR = 3
"""Contents come back soon if one of so many calls before had them (two prompts, or three, taking
turns for guidance)."""


@dataclass(frozen=True)
class Split:
    """The calls to judge by; ``reason`` is a sentence to the user unless whole runs are apart."""

    held_out: frozenset[int]
    by: HeldOutBy
    reason: str = ""


def split(contents: Mapping[int, Contents], kept: Sequence[int], seed: int) -> Split:
    """Hold out about a quarter of ``kept``, the calls with sampled rows, in ascending order.

    ``contents``: all calls seen, in order, ``kept`` among them. By run where two or more are told
    apart, else by call; a single call is left whole and its rows are split.
    """
    if len(kept) < 2:
        return Split(
            frozenset(),
            "none",
            "calibration saw a single call, so gains are judged on rows of the call they were "
            "fitted to; observe more calls",
        )
    runs = _runs(contents)
    calls = Counter(runs[call] for call in kept)
    draw = random.Random(f"{seed}/split")
    if len(calls) < 2:
        return Split(
            frozenset(_one_per_stretch(kept, draw)),
            "call",
            "calibration tells no two prompts apart, so rows to judge by are held out by call and "
            "gains may look larger than they are; observe several prompts",
        )
    # NOTE The empty prompt of guidance holds half of all calls: held out, it would leave no prompt
    # to judge by, so a run of that size is fitted to while there is another to hold out.
    small = [run for run, count in calls.items() if 2 * count < len(kept)] or list(calls)
    chosen = set(draw.sample(small, min(len(small), max(1, round(len(calls) / SHARE)))))
    return Split(frozenset(call for call in kept if runs[call] in chosen), "run")


def conditioning(contents: Sequence[Contents]) -> tuple[str, ...]:
    """The inputs whose contents make a run: they come back, and change.

    Those whose contents come back soon in most calls, unless another does so much more steadily.
    Failing these (prompts in random order), the input with the fewest contents, if each comes on
    average more than twice: the latents that two guidance branches share come exactly twice.
    """
    columns = {
        name: [call.get(name, -1) for call in contents]
        for name in dict.fromkeys(name for call in contents for name in call)
    }
    columns = {name: column for name, column in columns.items() if len(set(column)) > 1}
    soon = {name: _comes_back_soon(column) for name, column in columns.items()}
    most = max(soon.values(), default=0.0)
    if most > 0.5:
        return tuple(name for name, share in soon.items() if share > max(0.5, 0.75 * most))
    fewest = min(columns, key=lambda name: len(set(columns[name])), default=None)
    if fewest is None or 2 * len(set(columns[fewest])) >= len(contents):
        return ()
    return (fewest,)


def _runs(contents: Mapping[int, Contents]) -> dict[int, tuple[int, ...]]:
    names = conditioning(list(contents.values()))
    return {call: tuple(held.get(name, -1) for name in names) for call, held in contents.items()}


def _comes_back_soon(column: Sequence[int]) -> float:
    soon = sum(held in column[max(0, i - NEAR) : i] for i, held in enumerate(column))
    return soon / len(column)


def _one_per_stretch(kept: Sequence[int], draw: random.Random) -> list[int]:
    """A random one of each ``SHARE`` neighbours, at least one: spread, but in no step with them."""
    count = max(1, round(len(kept) / SHARE))
    borders = [i * len(kept) // count for i in range(count + 1)]
    return [kept[draw.randrange(start, stop)] for start, stop in pairwise(borders)]
