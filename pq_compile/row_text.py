"""The text of the kernels of a row program, generated step by step.

A program instance holds whole rows in registers, a row at a time: a row of 3072 channels is three
chunks of 1024, so that no lane is idle. NVFP4 needs the largest magnitude of all rows before the
first code can be written, so its programs run twice, first for the peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from . import templates
from .row_templates import ENCODE_FP8, FINITE_PEAK, LARGEST_OF, ROUND_E2M1, SCALE_OF_GROUPS
from .rows import FOLD, OPS, SMALLEST_PEAK, Program

Phase = Literal["once", "peak", "codes"]
TYPES = {
    torch.float16: "tl.float16",
    torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
}
GROUP, MOST_CHUNKS = 16, 8


class Chunk(NamedTuple):
    """``size`` channels from ``start``, a power of two; only the first ``valid`` lie in the row."""

    start: int
    size: int
    valid: int

    @property
    def masked(self) -> bool:
        return self.valid < self.size


@cache
def chunks(width: int) -> tuple[Chunk, ...]:
    """At most ``MOST_CHUNKS`` chunks of one size that cover ``width`` with the fewest idle lanes.

    Of one size, so that they are added lane by lane before the lanes are.
    """

    def size(count: int) -> int:
        return max(GROUP, 1 << (-(-width // count) - 1).bit_length())

    count = min(range(1, MOST_CHUNKS + 1), key=lambda n: (-(-width // size(n)) * size(n), n))
    step = size(count)
    return tuple(Chunk(at, step, min(step, width - at)) for at in range(0, width, step))


@dataclass(frozen=True)
class RowKernel:
    """All that the text of a kernel depends on, and how it is launched."""

    program: Program
    phase: Phase
    rows: int = 4  # of one sample, one after the other, by one program instance
    warps: int = 4
    instruction: bool = False  # convert to e4m3 by instruction, which sm_89 and later have

    @property
    def name(self) -> str:
        return f"rows_{self.program.target}" + ("_peak" if self.phase == "peak" else "")


def source(kernel: RowKernel) -> str:
    """The text of ``kernel``: a pure function."""
    program = kernel.program
    helpers = templates.TENSOR_SCALE + templates.ENCODE_E4M3 + ENCODE_FP8[kernel.instruction]
    if program.target.startswith("nvfp4"):
        helpers += templates.DECODE_E4M3 + templates.PACK_INTEGER.format()
        helpers += ROUND_E2M1 + SCALE_OF_GROUPS + FINITE_PEAK + LARGEST_OF
    pointers = [f"x{i}, x{i}_b, x{i}_t" for i in range(len(program.inputs))]
    pointers += [f"kept{i}" for i in range(len(program.kept))] if kernel.phase != "codes" else []
    pointers += {
        "once": ["codes", "scales"] if program.target != "none" else [],
        "peak": ["peak"],
        "codes": ["peak", "codes", "scales", "tensor", "count"],
    }[kernel.phase]
    free = '["count", "T"]' if kernel.phase == "codes" else '["T"]'
    body = "\n".join("    " + line for line in _body(kernel))
    return (
        f"# {program}\n# {kernel.phase}, {kernel.rows} rows a program\n"
        + templates.HEADER
        + helpers
        + f"\n@triton.jit(do_not_specialize={free})\ndef {kernel.name}({', '.join(pointers)}, T):\n"
        + body
        + "\n"
    )


def _body(kernel: RowKernel) -> Iterator[str]:
    program = kernel.program
    if kernel.phase != "peak" and program.target != "none":
        yield from _pointers(program)
    yield "sample = tl.program_id(1).to(tl.int64)"
    yield f"first = tl.program_id(0) * {kernel.rows}"
    for width in sorted({w for w in program.widths if w > 1}):
        for c, chunk in enumerate(chunks(width)):
            yield f"c{width}_{c} = {chunk.start} + tl.arange(0, {chunk.size})"
    if kernel.phase == "peak":
        yield "largest = tl.program_id(0) * 0"
    if kernel.phase == "codes":
        yield "tensor_scale = tensor_scale_of(largest_of(peak, count))"
        if program.target in ("nvfp4", "nvfp4_half"):
            yield "tl.store(tensor, tensor_scale)"
    yield f"for row in range(first, tl.minimum(first + {kernel.rows}, T)):"
    for line in _row(kernel):
        yield "    " + line
    if kernel.phase == "peak":
        where = "tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)"
        yield f"tl.store(peak + {where}, largest)"


def _pointers(program: Program) -> Iterator[str]:
    """e4m3 numbers are written as their codes."""
    if program.target in ("fp8", "nvfp4_fp8"):
        yield "codes = codes.to(tl.pointer_type(tl.uint8))"
    if program.target == "nvfp4":
        yield "scales = scales.to(tl.pointer_type(tl.uint8))"


def _row(kernel: RowKernel) -> Iterator[str]:
    program = kernel.program
    yield "at = row + sample * 0"  # int64
    yield "index = sample * T + at"
    yield from _values(program)
    if kernel.phase != "codes":
        yield from _kept(program)
    if kernel.phase == "peak":
        for name, chunk, _ in _parts(program):
            groups = f"{name}.reshape({chunk.size // GROUP}, {GROUP})"
            yield f"largest = tl.maximum(largest, finite_peak({groups}))"
    elif kernel.phase == "codes":
        yield from _codes(program)
    elif program.target == "fp8":
        yield from _fp8(program)


def _kept(program: Program) -> Iterator[str]:
    """Values that are read elsewhere too."""
    for i, (value, dtype) in enumerate(program.kept):
        width = program.widths[value]
        for c, chunk in enumerate(chunks(width)):
            mask = f", c{width}_{c} < {width}" if chunk.masked else ""
            where = f"kept{i} + index * {width} + c{width}_{c}"
            yield f"tl.store({where}, {_name(program, value, c)}.to({TYPES[dtype]}){mask})"


def _fp8(program: Program) -> Iterator[str]:
    """Codes = value / scale, scale = largest magnitude / 448, one scale a row."""
    yield "largest = 0.0"
    for part in program.parts:
        names = [f"tl.abs({name})" for name, _, _ in _parts(program, part)]
        yield f"largest = tl.maximum(largest, tl.max({_folded('tl.maximum({}, {})', names)}, 0))"
    yield f"scale = tl.div_rn(tl.maximum(largest, {SMALLEST_PEAK!r}), 448.0)"
    yield "inverse = tl.div_rn(1.0, scale)"
    yield "tl.store(scales + index, scale)"
    for name, chunk, at in _parts(program):
        where = f"codes + index * {program.width} + {at} + tl.arange(0, {chunk.size})"
        yield f"tl.store({where}, encode_fp8({name} * inverse){_inside(chunk)})"


def _codes(program: Program) -> Iterator[str]:
    """NVFP4 by the scale of the whole tensor: packed, or multiplied out to 8 or 16 bits."""
    if program.target == "nvfp4_fp8":
        yield "tl.store(scales + index, 6.0 * tensor_scale)"
    for name, chunk, at in _parts(program):
        size = chunk.size
        yield f"groups = {name}.reshape({size // 16}, 16)"
        yield "code, scale, scaled = scale_of_groups(groups, tensor_scale)"
        if program.target == "nvfp4":
            yield "scaled = tl.where(scaled == scaled, scaled, 0.0)"
            yield f"even, odd = tl.split(scaled.reshape({size // 2}, 2))"
            for to, what, each in (("codes", "pack(even, odd)", 2), ("scales", "code", 16)):
                where = f"index * {program.width // each} + {at // each}"
                where += f" + tl.arange(0, {size // each})"
                mask = _inside(chunk, each)
                yield f"tl.store({to} + {where}, {what}.to(tl.uint8){mask})"
            continue
        if program.target == "nvfp4_fp8":
            yield f"value = encode_fp8(round_e2m1(scaled) * (scale * {FOLD!r})[:, None])"
        else:
            yield "value = (round_e2m1(scaled) * scale[:, None]).to(tl.bfloat16)"
        where = f"codes + index * {program.width} + {at} + tl.arange(0, {size})"
        yield f"tl.store({where}, value.reshape({size}){_inside(chunk)})"


def _inside(chunk: Chunk, each: int = 1) -> str:
    """The mask of a store of one number for ``each`` channels of ``chunk``."""
    if not chunk.masked:
        return ""
    return f", tl.arange(0, {chunk.size // each}) < {chunk.valid // each}"


def _parts(program: Program, only: int | None = None) -> Iterator[tuple[str, Chunk, int]]:
    """The chunks that are quantised: name, chunk, and the channel of the output it begins at."""
    at = 0
    for part in program.parts:
        width = program.widths[part]
        for c, chunk in enumerate(chunks(width)):
            name = _name(program, part, c)
            if only not in (None, part):
                continue
            if chunk.masked:
                name = f"tl.where(c{width}_{c} < {width}, {name}, 0.0)"
            yield name, chunk, at + chunk.start
        at += width


# ---------------------------------------------------------------- values


def _name(program: Program, value: int, chunk: int) -> str:
    return f"v{value}" if program.widths[value] == 1 else f"v{value}_{chunk}"


def _values(program: Program) -> Iterator[str]:
    """Statements that load and compute every value, what a sample shares as late as can be: fewer
    registers then wait for it, and more rows are under way at once.
    """
    for number in _as_needed(program):
        if number >= len(program.inputs):
            yield from _step(program, number)
            continue
        width = program.widths[number]
        for c, chunk in enumerate(chunks(width)):
            mask = f", c{width}_{c} < {width}, other=0.0" if chunk.masked else ""
            at = f"x{number} + sample * x{number}_b + at * x{number}_t + c{width}_{c}"
            yield f"v{number}_{c} = tl.load({at}{mask}).to(tl.float32)"


def _as_needed(program: Program) -> list[int]:
    """Rows first; what a sample shares just before the first step that reads it."""
    found = dict.fromkeys(i for i, one in enumerate(program.inputs) if one.kind == "row")
    for i, step in enumerate(program.steps, len(program.inputs)):
        found |= dict.fromkeys([*(a for a in step.args if type(a) is int), i])
    return list(found | dict.fromkeys(program.parts))


def _step(program: Program, number: int) -> Iterator[str]:
    op, args = program.steps[number - len(program.inputs)]
    if OPS[op].text:
        for c in range(len(chunks(program.widths[number]))):
            given = [_name(program, a, c) if type(a) is int else repr(a) for a in args]
            yield f"{_name(program, number, c)} = {OPS[op].text.format(*given)}"
        return
    source, width = int(args[0]), program.widths[int(args[0])]
    names = [f"v{source}_{c}" for c in range(len(chunks(width)))]
    masks = [f"c{width}_{c} < {width}" if k.masked else "" for c, k in enumerate(chunks(width))]
    if op == "layer_norm":
        yield f"mean = {_sum(names, masks)} * {1.0 / width!r}"
        for c, name in enumerate(names):
            yield f"v{number}_{c} = {name} - mean"
        names = [f"v{number}_{c}" for c in range(len(names))]
    squares = [f"{name} * {name}" for name in names] if op != "mean" else names
    yield f"mean = {_sum(squares, masks)} * {1.0 / width!r}"
    if op == "mean":
        yield f"v{number} = mean"
        return
    for c, name in enumerate(names):
        yield f"v{number}_{c} = {name} * tl.rsqrt(mean + {args[1]!r})"


def _sum(names: Sequence[str], masks: Sequence[str]) -> str:
    inside = [
        f"tl.where({mask}, {name}, 0.0)" if mask else name
        for name, mask in zip(names, masks, strict=True)
    ]
    return f"tl.sum({_folded('{} + {}', inside)}, 0)"


def _folded(both: str, terms: Sequence[str]) -> str:
    """``terms`` joined two by two by the expression ``both``."""
    whole = terms[0]
    for term in terms[1:]:
        whole = both.format(whole, term)
    return whole
