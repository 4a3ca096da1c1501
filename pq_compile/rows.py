"""Row programs: what is computed of each row of an activation before, and while, it is quantised.

A program is a frozen value with one spelling in text, ``parse(str(program)) == program``::

    row 3072 | row 3072 | sample 3072 | mul 1 2 | add 0 3 | layer_norm 4 1e-06 | ... | keep 4
    bfloat16 | fp8 5

Values are numbered in order: the inputs, then one for each step. An input of kind ``row`` is
[B, T, K], one of kind ``sample`` [B, 1, K] or [1, 1, K] (read once for all rows of a sample). All
arithmetic is in fp32 and rounded nowhere in between, as Inductor computes a fused chain; in fp64
for fp64 inputs, which only the reference does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Refused
from .formats import NVFP4
from .minifloat import E4M3

Target = Literal["fp8", "nvfp4", "nvfp4_fp8", "nvfp4_half", "none"]
"""What becomes of the rows: e4m3 with a scale a row; NVFP4 as packed codes, as e4m3 numbers
(element * scale / 6), or as 16-bit numbers (element * scale, exact); nothing."""

SMALLEST_PEAK = 2.0**-100
"""The least peak that a row is scaled by: its reciprocal, times 448, is finite in fp32."""

FOLD = 1.0 / 6.0
"""An NVFP4 element times its scale is kept in e4m3 as a sixth of it: every 6, 3 and 1.5 of a group
stays exact, and nothing exceeds 448."""


class Op(NamedTuple):
    """One operation of a step: what it is in torch, and in the text of a kernel."""

    torch: Callable[..., Tensor]
    text: str  # of operands {0}, {1}; empty: a reduction over the row, which has its own text


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


OPS: dict[str, Op] = {
    "add": Op(lambda x, y: x + y, "{0} + {1}"),
    "sub": Op(lambda x, y: x - y, "{0} - {1}"),
    "mul": Op(lambda x, y: x * y, "{0} * {1}"),
    "div": Op(lambda x, y: x / y, "{0} / {1}"),
    "neg": Op(lambda x: -x, "-{0}"),
    "square": Op(torch.square, "{0} * {0}"),
    "sqrt": Op(torch.sqrt, "tl.sqrt({0})"),
    "rsqrt": Op(torch.rsqrt, "tl.rsqrt({0})"),
    "exp": Op(torch.exp, "tl.exp({0})"),
    "tanh": Op(torch.tanh, "2.0 * tl.sigmoid(2.0 * {0}) - 1.0"),
    "sigmoid": Op(torch.sigmoid, "tl.sigmoid({0})"),
    "relu": Op(torch.relu, "tl.maximum({0}, 0.0)"),
    "silu": Op(F.silu, "{0} * tl.sigmoid({0})"),
    "gelu": Op(F.gelu, "0.5 * {0} * (1.0 + tl.erf(0.7071067811865476 * {0}))"),
    "gelu_tanh": Op(
        lambda x: F.gelu(x, approximate="tanh"),
        "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    ),
    "mean": Op(lambda x: x.mean(-1, keepdim=True), ""),
    "layer_norm": Op(_layer_norm, ""),
    "rms_norm": Op(_rms_norm, ""),
}


class Input(NamedTuple):
    kind: Literal["row", "sample"]
    width: int


class Step(NamedTuple):
    """``args``: an int is the number of a value, a float a constant."""

    op: str
    args: tuple[int | float, ...]


class Kept(NamedTuple):
    """A value that something else reads as well: written in ``dtype``, [B, T, width]."""

    value: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Program:
    """Inputs, steps, the values that are written, and those that are quantised side by side."""

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    kept: tuple[Kept, ...]
    parts: tuple[int, ...]
    target: Target

    def __str__(self) -> str:
        lines = [f"{kind} {width}" for kind, width in self.inputs]
        lines += [" ".join([step.op, *map(repr, step.args)]) for step in self.steps]
        lines += [f"keep {value} {str(dtype).removeprefix('torch.')}" for value, dtype in self.kept]
        return " | ".join([*lines, " ".join([self.target, *map(str, self.parts)])])

    @property
    def widths(self) -> tuple[int, ...]:
        """Of every value; 1 for a number that the row shares."""
        widths = [width for _, width in self.inputs]
        for op, args in self.steps:
            widths.append(1 if op == "mean" else max(widths[a] for a in args if type(a) is int))
        return tuple(widths)

    @property
    def width(self) -> int:
        """Channels that are quantised."""
        return sum(self.widths[part] for part in self.parts)


@cache
def parse(text: str) -> Program:
    """The program that ``text`` spells.

    ``Refused`` for a word that is none of the language, and for parts that are not whole groups.
    """
    inputs: list[Input] = []
    steps: list[Step] = []
    kept: list[Kept] = []
    *lines, last = (line.split() for line in text.split(" | "))
    for word, *rest in lines:
        match word:
            case "row" | "sample":
                inputs.append(Input(word, int(rest[0])))
            case "keep":
                kept.append(Kept(int(rest[0]), getattr(torch, rest[1])))
            case _ if word in OPS:
                steps.append(Step(word, tuple(map(_number, rest))))
            case _:
                raise Refused(f"permuquant: {word!r} is no operation of a row program")
    target, *parts = last
    if target not in get_args(Target):
        raise Refused(f"permuquant: {target!r} is nothing that a row program can quantise to")
    program = Program(
        tuple(inputs),
        tuple(steps),
        tuple(kept),
        tuple(map(int, parts)),
        target,  # type: ignore[arg-type]
    )
    for part in program.parts:
        if program.widths[part] % NVFP4.group:
            raise Refused(
                f"permuquant: a row program quantises groups of {NVFP4.group} channels, and value "
                f"{part} has {program.widths[part]}"
            )
    return program


def _number(word: str) -> int | float:
    return int(word) if word.lstrip("-").isdigit() else float(word)


# ---------------------------------------------------------------- the definition


def lead_of(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    """The sizes before the channels that all inputs have together."""
    together = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))  # type: ignore[no-untyped-call]
    return tuple(together)


def values(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every value of the program, in fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    found = [x.to(wide) for x in inputs]
    for op, args in program.steps:
        found.append(OPS[op].torch(*(found[a] if type(a) is int else a for a in args)))
    return found


def reference(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the kernels of ``program`` compute: the quantised rows, then the values kept.

    ``fp8``: codes [B, T, K], scales fp32 [B, T, 1]. ``nvfp4``: packed [B, T, K/2], scales
    [B, T, K/16], tensor scale []. ``nvfp4_fp8``: codes [B, T, K], scales [B, T, 1], all of them six
    times the tensor scale. ``nvfp4_half``: bfloat16 [B, T, K], tensor scale [].
    """
    found = values(program, inputs)
    lead = lead_of(inputs)
    whole = [found[v].expand(*lead, found[v].shape[-1]) for v, _ in program.kept]
    plain: dict[str, Any] = {"copy": True, "memory_format": torch.contiguous_format}
    kept = [x.to(dtype, **plain) for x, (_, dtype) in zip(whole, program.kept, strict=True)]
    if program.target == "none":
        return kept
    x = torch.cat([found[part].expand(*lead, found[part].shape[-1]) for part in program.parts], -1)
    return [*_quantised(x, program.target), *kept]


def _quantised(x: Tensor, target: Target) -> tuple[Tensor, ...]:
    if target == "fp8":
        return quantise_rows(x)
    if target == "nvfp4":
        return NVFP4.quantize(x)
    scales, tensor_scale = NVFP4.scales(x)
    elements = NVFP4.elements(x, scales, tensor_scale)
    if target == "nvfp4_half":
        return NVFP4.times(elements, scales).to(torch.bfloat16), tensor_scale
    elements.add_(0.0)  # a zero has no sign here
    return fold(elements, scales), (tensor_scale * 6.0).expand(*x.shape[:-1], 1).contiguous()


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` [..., K] -> e4m3 [..., K] and fp32 [..., 1]: x ~ code * scale, scale = peak / 448.

    A NaN stays NaN, an infinity becomes one; the other channels of its row become 0.
    """
    x = x.to(torch.float32)
    size = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).abs()
    peak = size.amax(-1, keepdim=True) if x.shape[-1] else size.new_zeros((*x.shape[:-1], 1))
    scale = peak.clamp(min=SMALLEST_PEAK) / peak.new_full((), E4M3.largest)
    scaled = x * (1.0 / scale)
    return scaled.clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn), scale


def fold(elements: Tensor, scales: Tensor) -> Tensor:
    """e4m3 [..., K]: ``element * (scale / 6)``, rounded to nearest even."""
    return NVFP4.times(elements.clone(), scales.to(torch.float32) * FOLD).to(torch.float8_e4m3fn)
