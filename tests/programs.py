"""Random row programs, inputs for them, and whether codes are those nearest to exact numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pq_compile.formats import NVFP4
from pq_compile.minifloat import E2M1, E4M3, Minifloat
from pq_compile.rows import Input, Kept, Program, Step, Target, lead_of, values

EXACT = ("add", "sub", "mul", "neg", "square", "relu")
"""Rounded once each, so that any order of lanes gives the same bits."""

SMOOTH = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "layer_norm", "rms_norm", "relu")
COMPOSED = ("mean", "sqrt", "rsqrt", "div", "exp")
"""Of operands that keep them away from poles: see ``_Drawing.composed``."""

BINARY = ("add", "sub", "mul", "div")
KEPT = (torch.float32, torch.float16)
"""What Triton's interpreter writes as a device does."""


def random_program(
    seed: int, target: Target, widths: Sequence[int], exact: bool, steps: int = 6
) -> Program:
    """A program whose parts have ``widths``, each with inputs and steps of its own."""
    draw = _Drawing(random.Random(seed), exact, widths)
    return draw.program([draw.part(i, steps) for i in range(len(widths))], target)


class _Drawing:
    """Values in the making; ``known`` are those of the part at hand, ``last`` is its result."""

    def __init__(self, source: random.Random, exact: bool, widths: Sequence[int]) -> None:
        self.random, self.exact = source, exact
        self.inputs: list[Input] = []
        self.steps: list[Step] = []
        self.of: list[list[int]] = []  # the inputs of each part
        for width in widths:
            kinds = ["row", *source.choices(("row", "sample"), k=source.randint(0, 2))]
            self.of.append([len(self.inputs) + i for i in range(len(kinds))])
            self.inputs += [Input(kind, width) for kind in kinds]  # type: ignore[arg-type]

    def part(self, index: int, most: int) -> int:
        self.known = list(self.of[index])
        self.last = self.known[0]
        for _ in range(self.random.randint(0, most)):
            self.step()
        return self.last

    def step(self) -> None:
        op = self.random.choice(EXACT if self.exact else (*EXACT, *SMOOTH, *COMPOSED))
        x = self.random.choice([self.last, self.random.choice(self.known)])
        if op in COMPOSED:
            self.last = self.composed(op, x)
        elif op in ("layer_norm", "rms_norm"):
            self.last = self.add(op, x, self.random.choice((1e-6, 1e-5)))
        elif op in BINARY:
            other = self.random.choice([*self.known, float(self.random.randint(-8, 8)) / 4])
            pair = (x, other) if self.random.random() < 0.7 else (other, x)
            self.last = self.add(op, *pair)
        else:
            self.last = self.add(op, x)
        self.known.append(self.last)

    def composed(self, op: str, x: int) -> int:
        """mean(x) * x; sqrt(x^2 + 1); x * rsqrt(mean(x^2) + 1); x / (x^2 + 1); exp(tanh(x))."""
        if op == "exp":
            return self.add("exp", self.add("tanh", x))
        if op == "mean":
            return self.add("mul", self.add("mean", x), x)
        square = self.add("square", x)
        if op == "rsqrt":
            away = self.add("add", self.add("mean", square), 1.0)
            return self.add("mul", x, self.add("rsqrt", away))
        away = self.add("add", square, 1.0)
        return self.add("sqrt", away) if op == "sqrt" else self.add("div", x, away)

    def add(self, op: str, *args: int | float) -> int:
        self.steps.append(Step(op, args))
        return len(self.inputs) + len(self.steps) - 1

    def program(self, parts: Sequence[int], target: Target) -> Program:
        inputs, steps = tuple(self.inputs), tuple(self.steps)
        whole = Program(inputs, steps, (), (), target)
        rows = [i for i, shared in enumerate(_shared(whole)) if not shared and whole.widths[i] > 1]
        some = self.random.sample(rows, min(len(rows), self.random.randint(0, 2)))
        kept = tuple(Kept(i, self.random.choice(KEPT)) for i in some)
        if target == "none":
            return Program(inputs, steps, kept or (Kept(rows[-1], torch.float32),), (), target)
        return Program(inputs, steps, kept, tuple(parts), target)


def _shared(program: Program) -> list[bool]:
    found = [kind == "sample" for kind, _ in program.inputs]
    for _, args in program.steps:
        found.append(all(found[a] for a in args if type(a) is int))
    return found


def inputs_of(
    program: Program, batch: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Normal numbers in [B, T, K] or [B, 1, K], [1, 1, K]; each second row input strided."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, (kind, width) in enumerate(program.inputs):
        first = batch if kind == "row" or i % 2 else 1
        x = torch.randn(
            first, tokens if kind == "row" else 1, width + 16 * (i % 2), generator=generator
        )
        found.append(x.to(dtype)[..., :width])
    return found


class Strays(NamedTuple):
    """How many codes are not the nearest to an exact number, of how many."""

    scales: int
    codes: int
    of: int


def strays(program: Program, inputs: Sequence[Tensor], found: Sequence[Tensor]) -> Strays:
    """Judge what kernels wrote: each code and scale against the exact number it stands for.

    A code may be off where the number lies as near to the tie as fp32 arithmetic is exact: some
    units in the last place of it and of the largest number of its row, and some times what the
    definition in fp32 loses in that row, where terms cancel.
    """
    x, plain = (
        torch.cat([v[p].expand(*lead_of(inputs), v[p].shape[-1]) for p in program.parts], -1)
        for v in (values(program, [x.double() for x in inputs]), values(program, inputs))
    )
    lost = 4 * (plain.double() - x).abs().amax(-1, keepdim=True)
    near = 3e-6 * (x.abs() + x.abs().amax(-1, keepdim=True)) + lost
    if program.target == "fp8":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=2.0**-100) / 448
        wrong = (found[1].double() - scale).abs() > 2e-5 * scale + lost / 448
        scale = found[1].double()
        return Strays(
            int(wrong.sum()), _far(x / scale, found[0].float(), E4M3, near / scale), x.numel()
        )
    groups, slack = (one.view(*one.shape[:-1], -1, 16) for one in (x, near))
    tensor = x.abs().amax().clamp(min=2.0**-100) / 2688
    if program.target == "nvfp4":
        elements, scales, tensor = NVFP4.unpack(found[0]), found[1].double(), found[2].double()
        peak, bound = groups.abs().amax(-1), slack.amax(-1)
        wrong_scales = _far(peak / (6 * tensor), scales.float(), E4M3, bound / (6 * tensor))
        unit = (scales * tensor).unsqueeze(-1)
        safe = unit.masked_fill(unit == 0, 1.0)
        codes = elements.view(groups.shape)
        return Strays(wrong_scales, _far(groups / safe, codes, E2M1, slack / safe), x.numel())
    held = found[0].double() * (tensor if program.target == "nvfp4_half" else 6 * tensor)
    error = (held.view(groups.shape) - groups).abs()
    # at most half of the largest step, 2 of 6, and where it was folded half a step of e4m3 more
    most = groups.abs().amax(-1, keepdim=True) * (1 / 6 + 1 / 16 + 1 / 16)
    return Strays(0, int((error > most + slack + 448 * 2.0**-10 * tensor).sum()), x.numel())


def _far(exact: Tensor, found: Tensor, grid: Minifloat, slack: Tensor) -> int:
    """How many of ``found``, numbers of ``grid``, are further from ``exact`` than the nearest."""
    least = (grid.round_(exact.float()).double() - exact).abs()
    return int(((found.double() - exact).abs() > least + slack + 1e-6 * exact.abs()).sum())


def differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """How many numbers differ, in their bits; zeros of either sign and any NaN are alike."""
    return sum(_differing(a, b) for a, b in zip(found, expected, strict=True))


def _differing(a: Tensor, b: Tensor) -> int:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if a.dtype == torch.uint8:
        return int((a != b).sum())
    a, b = a.float(), b.float()
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())
