"""The designs of the W4A16 matrix-vector kernel, in PTX: how codes and channels become products.

half     An e2m1 code shifted into place is, as a float16, its value * 2**-14: two to a register. x
         is normalised by a power of two a group, its largest channel to 2**13 .. 2**14. The 16
         products of a group are summed in float16, 8 and 8.
integer  A byte permutation looks 128 + 2 * e2m1 up, four at a time. x is rounded to 16 bits, by a
         power of two a group, and held as two planes of bytes; sums of products are exact.

The channels of x meet the codes in the order in which decoding leaves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .templates import DECODE_E4M3

TYPES = {"r": "tl.int32", "f": "tl.float32"}


@dataclass(frozen=True)
class Design:
    """The three functions that differ: PTX, and how many words each hands on."""

    codes: int  # words that the codes of a group unfold to
    channels: int  # words that the channels of a group fold to
    unfold: str
    dot: str
    fold: Mapping[str, str]  # by the dtype of x


def assembly(name: str, outputs: str, inputs: str, lines: Iterable[str], pure: bool = True) -> str:
    """A Triton function of inline PTX; operands are $0, $1, ...: outputs first, then inputs."""
    arguments = ", ".join(f"i{i}" for i in range(len(inputs)))
    dtypes = ", ".join(TYPES[one] for one in outputs)
    body = "".join(f"        {line};\n" for line in lines)
    return (
        f"\n@triton.jit\ndef {name}({arguments}):\n"
        f'    return tl.inline_asm_elementwise(\n        """\n        {{\n{body}        }}\n'
        f'        """,\n        "{",".join([*("=&" + one for one in outputs), *inputs])}",\n'
        f"        [{arguments}],\n"
        f"        dtype={f'({dtypes})' if len(outputs) > 1 else dtypes},\n"
        f"        is_pure={pure},\n        pack=1,\n    )\n"
    )


def _unfold_half() -> Iterable[str]:
    """Even nibbles to bytes e, odd ones to bytes o: sign, 000, magnitude, 0. Bytes to halves."""
    yield ".reg .b32 w<2>, s, t, e, o"
    yield "mov.b64 {w0, w1}, $8"
    for word in range(2):
        yield f"and.b32 s, w{word}, 0x88888888"
        yield f"shr.b32 t, w{word}, 3"
        yield "lop3.b32 o, t, s, 0x0E0E0E0E, 0xE4"  # t where the mask is 1, s elsewhere
        yield "shl.b32 s, s, 4"
        yield f"shl.b32 t, w{word}, 1"
        yield "lop3.b32 e, t, s, 0x0E0E0E0E, 0xE4"
        yield f"prmt.b32 ${4 * word}, e, 0, 0x2404"
        yield f"prmt.b32 ${4 * word + 1}, o, 0, 0x2404"
        yield f"and.b32 ${4 * word + 2}, e, 0xFF00FF00"
        yield f"and.b32 ${4 * word + 3}, o, 0xFF00FF00"


def _dot_half() -> Iterable[str]:
    yield ".reg .b32 sum"
    yield ".reg .b16 low, high"
    yield ".reg .f32 f, g"
    yield "mul.rn.f16x2 sum, $1, $9"
    for i in range(2, 9):
        yield f"fma.rn.f16x2 sum, ${i}, ${i + 8}, sum"
    yield "mov.b32 {low, high}, sum"
    yield "cvt.f32.f16 f, low"
    yield "cvt.f32.f16 g, high"
    yield "add.f32 $0, f, g"


def _floats(dtype: str, first: int) -> Iterable[str]:
    """Operands from ``first`` on, 8 words, as floats f0 .. f15; top = 2**their exponent."""
    mask, kind = ("0x7F807F80", "bf16x2") if dtype == "torch.bfloat16" else ("0x7C007C00", "f16x2")
    yield ".reg .b32 a<8>, top, next, norm, factor"
    yield ".reg .b16 low, high"
    yield ".reg .f32 f<16>, n"
    for i in range(8):
        yield f"and.b32 a{i}, ${first + i}, {mask}"
    for i, j in ((0, 1), (2, 3), (4, 5), (6, 7), (0, 2), (4, 6), (0, 4)):
        yield f"max.{kind} a{i}, a{i}, a{j}"
    yield "shl.b32 next, a0, 16"
    yield "max.u32 top, a0, next"
    yield "and.b32 top, top, 0xFFFF0000"
    if dtype == "torch.bfloat16":
        for i in range(8):
            yield f"shl.b32 a{i}, ${first + i}, 16"
            yield f"mov.b32 f{2 * i}, a{i}"
            yield f"and.b32 a{i}, ${first + i}, 0xFFFF0000"
            yield f"mov.b32 f{2 * i + 1}, a{i}"
        yield "max.u32 top, top, 0x08000000"
        return
    yield "mov.b32 {low, high}, top"
    yield "cvt.f32.f16 n, high"
    yield "mov.b32 top, n"
    for i in range(8):
        yield f"mov.b32 {{low, high}}, ${first + i}"
        yield f"cvt.f32.f16 f{2 * i}, low"
        yield f"cvt.f32.f16 f{2 * i + 1}, high"
    yield "max.u32 top, top, 0x38000000"  # of subnormals the exponent says nothing


def _fold_half(dtype: str) -> Iterable[str]:
    """Words of x * 2**(13 - top) in float16, channels 4 apart to a word; then 2 * 2**top."""
    yield from _floats(dtype, 9)
    yield "min.u32 top, top, 0x7E000000"
    yield "sub.u32 norm, 0x85800000, top"
    yield "mov.b32 n, norm"
    for i in range(16):
        yield f"mul.rn.f32 f{i}, f{i}, n"
    for word in range(8):
        channel = word // 4 * 8 + word % 4
        yield f"cvt.rn.f16x2.f32 ${word}, f{channel + 4}, f{channel}"
    yield "add.u32 factor, top, 0x00800000"
    yield "mov.b32 $8, factor"


def _unfold_integer() -> Iterable[str]:
    """Of positive codes p is the magnitude, of negative ones q; the other is 0. p - q + 128."""
    yield ".reg .b32 w<2>, v, p, q"
    yield "mov.b64 {w0, w1}, $4"
    for word in range(2):
        yield f"xor.b32 v, w{word}, 0x88888888"
        for half in range(2):
            yield f"prmt.b32 p, 0x03020100, 0x0C080604, w{word}"
            yield "prmt.b32 q, 0x03020100, 0x0C080604, v"
            yield "sub.u32 p, p, q"
            yield f"add.u32 ${2 * word + half}, p, 0x80808080"
            if half == 0:
                yield f"shr.b32 w{word}, w{word}, 16"
                yield "shr.b32 v, v, 16"


def _dot_integer() -> Iterable[str]:
    yield ".reg .b32 low, high"
    yield "dp4a.u32.u32 low, $1, $5, $13"
    yield "dp4a.u32.s32 high, $1, $9, 0"
    for i in range(2, 5):
        yield f"dp4a.u32.u32 low, ${i}, ${i + 4}, low"
        yield f"dp4a.u32.s32 high, ${i}, ${i + 8}, high"
    yield "mad.lo.s32 low, high, 256, low"
    yield "cvt.rn.f32.s32 $0, low"


def _fold_integer(dtype: str) -> Iterable[str]:
    """Of x * 2**(14 - top) low bytes, high bytes and -128 * the sum; then 2**(top - 15)."""
    yield from _floats(dtype, 10)
    yield ".reg .b32 i<16>, sum, highs, s, t"
    yield ".reg .pred infinite"
    yield "setp.ge.u32 infinite, top, 0x7F800000"
    yield "min.u32 top, top, 0x7F000000"
    yield "sub.u32 norm, 0x86000000, top"
    yield "mov.b32 n, norm"
    for i in range(16):  # the integer stands in the low bits of 1.5 * 2**23 plus it
        yield f"fma.rn.f32 f{i}, f{i}, n, 0f4B400000"
        yield f"mov.b32 i{i}, f{i}"
    for word in range(4):
        yield f"prmt.b32 s, i{4 * word}, i{4 * word + 1}, 0x5140"
        yield f"prmt.b32 t, i{4 * word + 2}, i{4 * word + 3}, 0x5140"
        yield f"prmt.b32 ${word}, s, t, 0x5410"
        yield f"prmt.b32 ${4 + word}, s, t, 0x7632"
        yield f"dp4a.u32.u32 sum, ${word}, 0x01010101, {'sum' if word else 0}"
        yield f"dp4a.s32.s32 highs, ${4 + word}, 0x01010101, {'highs' if word else 0}"
    yield "mad.lo.s32 sum, highs, 256, sum"
    yield "mul.lo.s32 $8, sum, -128"
    yield "sub.u32 factor, top, 0x07800000"
    yield "selp.b32 factor, 0x7FC00000, factor, infinite"
    yield "mov.b32 $9, factor"


PREFETCH = assembly(  # whole groups of 16 bytes, and by one thread; none where $3 is negative
    "prefetch",
    "r",
    "lrr",
    (
        ".reg .b32 thread, size",
        ".reg .b64 from",
        ".reg .pred asks",
        "mov.u32 thread, %tid.x",
        "setp.eq.u32 asks, thread, $3",
        "add.s64 from, $1, 15",
        "and.b64 from, from, -16",
        "and.b32 size, $2, -16",
        "@asks cp.async.bulk.prefetch.L2.global [from], size",
        "mov.b32 $0, 0",
    ),
    pure=False,
)

SCALE = assembly(
    "scale_of",
    "f",
    "r",
    (
        ".reg .b16 code, low, high",
        ".reg .b32 both",
        "cvt.u16.u32 code, $1",
        "cvt.rn.f16x2.e4m3x2 both, code",
        "mov.b32 {low, high}, both",
        "cvt.f32.f16 $0, low",
    ),
)
SCALE_BY_INTEGERS = (
    DECODE_E4M3
    + """
@triton.jit
def scale_of(code):
    return decode_e4m3(code).to(tl.float32)
"""
)

DTYPES = ("torch.bfloat16", "torch.float16")
DESIGNS = {
    "w4a16_half": Design(
        8,
        8,
        assembly("unfold", "r" * 8, "l", _unfold_half()),
        assembly("dot", "f", "r" * 16, _dot_half()),
        {one: assembly("fold", "r" * 8 + "f", "r" * 8, _fold_half(one)) for one in DTYPES},
    ),
    "w4a16_integer": Design(
        4,
        9,
        assembly("unfold", "r" * 4, "l", _unfold_integer()),
        assembly("dot", "f", "r" * 13, _dot_integer()),
        {one: assembly("fold", "r" * 9 + "f", "r" * 8, _fold_integer(one)) for one in DTYPES},
    ),
}
