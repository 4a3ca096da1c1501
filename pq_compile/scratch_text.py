"""The text of the kernels that decode NVFP4 weights into a scratch; ``scratch`` launches them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import triton

from . import templates
from .generated import function

Precision = Literal["fp8", "half"]

PART = '''
@triton.jit
def part(w_ptr, scale_ptr, tensor_ptr, bias_ptr, out_ptr, column_ptr, bias_out_ptr, factor, block,
         FIRST: tl.constexpr, N: tl.constexpr, BIAS: tl.constexpr):
    """A block of one weight, {EACH} channels from each integer; and the factor and bias of rows."""
    w_ptr = w_ptr.to(tl.pointer_type({INTEGER}))
    scale_ptr = scale_ptr.to(tl.pointer_type(tl.uint8))
    out_ptr = out_ptr.to(tl.pointer_type({WRITTEN}))
    index = block * {BLOCK} + tl.arange(0, {BLOCK})
    inside = index < N * {ROW}
    packed = tl.load(w_ptr + index, inside, other=0)
    code = tl.load(scale_ptr + index // {SHARE}, inside, other=0)
    scale = decode_e4m3(code.to(tl.int32)).to(tl.float32)
    left, right = unfold(packed, scale)
    both = tl.join(left, right).reshape(2 * {BLOCK})
    to = block.to(tl.int64) * (2 * {BLOCK}) + tl.arange(0, 2 * {BLOCK})
    tl.store(out_ptr + 2 * FIRST * {ROW} + to, both, to < 2 * N * {ROW})
    if block * {BLOCK} < N:
        column = tl.zeros(({BLOCK},), tl.float32) + (tl.load(tensor_ptr) * {TIMES}) * factor
        tl.store(column_ptr + FIRST + index, column, index < N)
        if BIAS:
            tl.store(bias_out_ptr + FIRST + index, tl.load(bias_ptr + index, index < N), index < N)
'''

UNFOLD = {
    "half": '''
@triton.jit
def unfold(byte, scale):
    """Two channels of a byte, times the scale: exact in bfloat16."""
    byte = byte.to(tl.int32)
    even = decode_e2m1(byte & 15).to(tl.float32) * scale
    odd = decode_e2m1(byte >> 4).to(tl.float32) * scale
    return even.to(tl.bfloat16), odd.to(tl.bfloat16)
''',
    "fp8": '''
@triton.jit
def code_of(code, sixth):
    value = decode_e2m1(code).to(tl.float32) * sixth
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (encode_e4m3(tl.abs(value)) | sign).to(tl.uint8)

@triton.jit
def unfold(byte, scale):
    """Two channels of a byte, times a sixth of the scale, rounded to e4m3."""
    byte = byte.to(tl.int32)
    sixth = scale * 0.1666666716337204
    return code_of(byte & 15, sixth), code_of(byte >> 4, sixth)
''',
    "fp8 instruction": '''
@triton.jit
def unfold(word, scale):
    """Eight channels of a word: the eight magnitudes of its group, rounded to e4m3, fill two
    registers, and its nibbles select their bytes."""
    low, high = tl.inline_asm_elementwise(
        """
        {{
        .reg .f32 half, more, two, three, four, six;
        .reg .b16 p0, p1, p2, p3;
        .reg .b32 a, b, select, sign, byte;
        mul.f32 half, $3, 0f3F000000;
        mul.f32 more, $3, 0f3FC00000;
        add.f32 two, $3, $3;
        mul.f32 three, $3, 0f40400000;
        mul.f32 four, $3, 0f40800000;
        mul.f32 six, $3, 0f40C00000;
        cvt.rn.satfinite.e4m3x2.f32 p0, half, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 p1, more, $3;
        cvt.rn.satfinite.e4m3x2.f32 p2, three, two;
        cvt.rn.satfinite.e4m3x2.f32 p3, six, four;
        mov.b32 a, {{p0, p1}};
        mov.b32 b, {{p2, p3}};
        and.b32 select, $2, 0x77777777;
        prmt.b32 $0, a, b, select;
        shr.u32 select, select, 16;
        prmt.b32 $1, a, b, select;
        shr.u32 sign, $2, 3;
        and.b32 sign, sign, 0x11111111;
        prmt.b32 byte, 0x8000, 0, sign;
        or.b32 $0, $0, byte;
        shr.u32 sign, sign, 16;
        prmt.b32 byte, 0x8000, 0, sign;
        or.b32 $1, $1, byte;
        }}
        """,
        "=&r,=&r,r,f",
        [word, scale * 0.1666666716337204],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return low, high
''',
}


@dataclass(frozen=True)
class DecodeKernel:
    """All that the text of a kernel depends on, and how it is launched."""

    precision: Precision
    k: int  # channels, a multiple of 16
    outputs: tuple[int, ...]  # output channels of each weight
    bias: bool
    factor: bool = False  # rows are to be multiplied by another number as well
    instruction: bool = False
    block: int = 1024  # integers that a program instance decodes
    warps: int = 4

    @property
    def each(self) -> int:
        """Channels in one integer: a word's by instruction, a byte's otherwise."""
        return 8 if self.instruction else 2

    @property
    def name(self) -> str:
        return f"decode_{self.precision}"

    @property
    def blocks(self) -> tuple[int, ...]:
        """Program instances for each weight."""
        return tuple(triton.cdiv(n * self.k // self.each, self.block) for n in self.outputs)


def source(kernel: DecodeKernel) -> str:
    """The text of ``kernel``: a pure function."""
    how = kernel.precision + (" instruction" if kernel.instruction else "")
    times = 6.0 if kernel.precision == "fp8" else 1.0
    each = kernel.each
    known: dict[str, Any] = {"BLOCK": kernel.block, "EACH": each}
    known |= {"ROW": kernel.k // each, "SHARE": 16 // each}
    known["INTEGER"] = "tl.int32" if kernel.instruction else "tl.uint8"
    known["WRITTEN"] = "tl.bfloat16" if kernel.precision == "half" else known["INTEGER"]
    helpers = templates.DECODE_E4M3 + templates.DECODE_E2M1 + templates.ENCODE_E4M3
    text = templates.HEADER + helpers + (UNFOLD[how] + PART).format(**known, TIMES=times)
    arguments = [f"w{i}, s{i}, t{i}, b{i}" for i in range(len(kernel.outputs))]
    arguments += ["out", "column", "bias", *(["factor"] if kernel.factor else [])]
    text += f"\n@triton.jit\ndef {kernel.name}({', '.join(arguments)}):\n"
    text += f'    """{list(kernel.outputs)} x {kernel.k} codes, one weight below the other."""\n'
    text += "    block = tl.program_id(0)\n"
    text += f"    times = {'tl.load(factor)' if kernel.factor else '1.0'}\n"
    first = before = 0
    for i, (n, blocks) in enumerate(zip(kernel.outputs, kernel.blocks, strict=True)):
        text += f"    {'if' if i == 0 else 'elif'} block < {before + blocks}:\n"
        text += f"        part(w{i}, s{i}, t{i}, b{i}, out, column, bias, times, block - {before}, "
        text += f"{first}, {n}, {kernel.bias})\n"
        first, before = first + n, before + blocks
    return text


@cache
def load(kernel: DecodeKernel) -> Any:
    """The Triton function of ``kernel``."""
    return function(kernel.name, source(kernel))
