"""An interpreter of the PTX in inline assembly, so that kernels with it run on the CPU, bit by bit.

It knows the instructions that the templates use and fails on any other. Registers are arrays of
64-bit integers, one number a lane; a block of lanes runs at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Bits = NDArray[np.uint64]
LOW = np.uint64(0xFFFFFFFF)


def run(text: str, outputs: int, inputs: Sequence[Bits]) -> list[Bits]:
    """The operands $0, $1, ... after ``text``, given those that follow the outputs."""
    registers: dict[str, Bits] = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in filter(None, (part.strip() for part in text.strip(" \n{}").split(";"))):
        if line.startswith((".reg", "@asks cp.async.bulk.prefetch")):
            continue
        opcode, rest = line.split(None, 1)
        names = [name.strip() for name in re.split(r",(?![^{]*})", rest)]
        step(opcode, names, registers)
    return [registers[f"${i}"] for i in range(outputs)]


def step(opcode: str, names: Sequence[str], registers: dict[str, Bits]) -> None:
    values = [read(name, registers) for name in names[1:]]
    if names[0].startswith("{"):
        width = {"mov.b32": 16, "mov.b64": 32}[opcode]
        for i, part in enumerate(names[0].strip("{}").split(",")):
            registers[part.strip()] = (values[0] >> np.uint64(i * width)) & mask(width)
        return
    wide = opcode.endswith("64")
    registers[names[0]] = OPERATIONS[opcode](*values) & (mask(64) if wide else LOW)


def read(name: str, registers: dict[str, Bits]) -> Bits:
    if name == "%tid.x":
        return np.array(0, dtype=np.uint64)
    if name.startswith("{"):
        low, high = (registers[part.strip()] for part in name.strip("{}").split(","))
        return low | high << np.uint64(16)
    if name.startswith("0f"):
        return np.array(int(name[2:], 16), dtype=np.uint64)
    if re.fullmatch(r"-?(0x[0-9A-F]+|\d+)", name):
        return np.array(int(name, 0) & 0xFFFFFFFF, dtype=np.uint64)
    return registers[name]


def mask(width: int) -> np.uint64:
    return np.uint64((1 << width) - 1)


def signed(x: Bits, width: int = 32) -> NDArray[np.int64]:
    return ((x & mask(width)) << np.uint64(64 - width)).astype(np.int64) >> np.int64(64 - width)


def unsigned(x: NDArray[np.int64]) -> Bits:
    return x.astype(np.uint64) & LOW


def as_float(x: Bits) -> NDArray[np.float64]:
    return x.astype(np.uint32).view(np.float32).astype(np.float64)


def as_half(x: Bits) -> NDArray[np.float64]:
    return x.astype(np.uint16).view(np.float16).astype(np.float64)


def to_float(x: NDArray[np.float64]) -> Bits:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x.astype(np.float32)).view(np.uint32).astype(np.uint64)


def to_half(x: NDArray[np.float64]) -> Bits:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x.astype(np.float16)).view(np.uint16).astype(np.uint64)


def halves(operation: Callable[..., Bits], *values: Bits) -> Bits:
    low, high = (
        operation(*((x >> np.uint64(shift)) & mask(16) for x in values)) for shift in (0, 16)
    )
    return low | high << np.uint64(16)


def multiply_add(x: Bits, y: Bits, z: Bits | None = None) -> Bits:
    """Of float16: products are exact in float64, and so are sums of what float16 holds here."""
    with np.errstate(invalid="ignore"):
        product = as_half(x) * as_half(y)
        return to_half(product if z is None else product + as_half(z))


def permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    """Bytes of {b, a} by nibbles; bit 3 of a nibble asks for eight copies of the byte's sign."""
    both = a | b << np.uint64(32)
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), dtype=np.uint64)
    for i in range(4):
        nibble = selector >> np.uint64(4 * i)
        byte = both >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
        sign = (byte >> np.uint64(7)) * np.uint64(0xFF)
        found |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return found


def table(a: Bits, b: Bits, c: Bits, lut: Bits) -> Bits:
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=np.uint64)
    for i in range(8):
        if lut.item() >> i & 1:
            terms = [x if i >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
            found |= terms[0] & terms[1] & terms[2]
    return found


def dot4(signs: tuple[bool, bool]) -> Callable[[Bits, Bits, Bits], Bits]:
    def byte(x: Bits, i: int, is_signed: bool) -> NDArray[np.int64]:
        part = (x >> np.uint64(8 * i)) & mask(8)
        return signed(part, 8) if is_signed else part.astype(np.int64)

    def operation(a: Bits, b: Bits, c: Bits) -> Bits:
        parts = [byte(a, i, signs[0]) * byte(b, i, signs[1]) for i in range(4)]
        return unsigned(sum(parts, signed(c)))

    return operation


def scales(code: Bits) -> Bits:
    """Two e4m3 codes, in the low 16 bits, as two float16."""
    pair = np.stack([code & mask(8), code >> np.uint64(8) & mask(8)], -1).astype(np.uint8)
    value = torch.from_numpy(pair).view(torch.float8_e4m3fn).to(torch.float16)
    bits = value.view(torch.int16).numpy().view(np.uint16).astype(np.uint64)
    return bits[..., 0] | bits[..., 1] << np.uint64(16)


def to_e4m3(high: Bits, low: Bits) -> Bits:
    """Two float32 as two e4m3 codes, the first above the second; 448 at most."""
    found = []
    for x in (high, low):
        value = torch.from_numpy(np.atleast_1d(as_float(x)).astype(np.float32)).clamp(-448, 448)
        codes = value.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint64)
        found.append(codes.reshape(np.shape(x)))
    return np.asarray(found[0] << np.uint64(8) | found[1])


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda x: x,
    "mov.u32": lambda x: x,
    "add.s64": np.add,
    "and.b64": np.bitwise_and,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shl.b32": np.left_shift,
    "shr.b32": lambda x, n: (x & LOW) >> n,
    "shr.u32": lambda x, n: (x & LOW) >> n,
    "add.u32": np.add,
    "sub.u32": np.subtract,
    "max.u32": np.maximum,
    "min.u32": np.minimum,
    "lop3.b32": table,
    "prmt.b32": permute,
    "mul.lo.s32": lambda x, y: unsigned(signed(x) * signed(y)),
    "mad.lo.s32": lambda x, y, z: unsigned(signed(x) * signed(y) + signed(z)),
    "dp4a.u32.u32": dot4((False, False)),
    "dp4a.u32.s32": dot4((False, True)),
    "dp4a.s32.s32": dot4((True, True)),
    "mul.rn.f16x2": lambda x, y: halves(multiply_add, x, y),
    "fma.rn.f16x2": lambda x, y, z: halves(multiply_add, x, y, z),
    # of magnitudes without NaN, whose bits are in the order of their values
    "max.f16x2": lambda x, y: halves(np.maximum, x, y),
    "max.bf16x2": lambda x, y: halves(np.maximum, x, y),
    "add.f32": lambda x, y: to_float(as_float(x) + as_float(y)),
    "mul.f32": lambda x, y: to_float(as_float(x) * as_float(y)),
    "mul.rn.f32": lambda x, y: to_float(as_float(x) * as_float(y)),
    "fma.rn.f32": lambda x, y, z: to_float(as_float(x) * as_float(y) + as_float(z)),
    "cvt.u16.u32": lambda x: x & mask(16),
    "cvt.f32.f16": lambda x: to_float(as_half(x)),
    "cvt.rn.f32.s32": lambda x: to_float(signed(x).astype(np.float64)),
    "cvt.rn.f16x2.f32": lambda x, y: to_half(as_float(y)) | to_half(as_float(x)) << np.uint64(16),
    "cvt.rn.f16x2.e4m3x2": scales,
    "cvt.rn.satfinite.e4m3x2.f32": to_e4m3,
    "setp.eq.u32": lambda x, y: (x == y).astype(np.uint64),
    "setp.ge.u32": lambda x, y: (x >= y).astype(np.uint64),
    "selp.b32": lambda x, y, p: np.where(p != 0, x, y),
}


class Call:
    """What Triton's interpreter gets back from inline assembly."""

    def __init__(self, found: Sequence[Any]) -> None:
        self.found = found

    def get_result(self, index: int) -> Any:
        return self.found[index]


def install() -> None:
    """Let Triton's interpreter run inline assembly by ``run``."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    types = {"float32": (np.uint32, np.float32), "int32": (np.uint32, np.int32)}

    def create(_: Any, text: str, constraints: str, values: Any, kinds: Any, *more: Any) -> Call:
        data = [value.data.view(f"u{value.data.itemsize}").astype(np.uint64) for value in values]
        found = []
        for bits, kind in zip(
            run(text, len(kinds), np.broadcast_arrays(*data)), kinds, strict=True
        ):
            first, second = types[kind.scalar.name.replace("fp32", "float32")]
            found.append(TensorHandle(bits.astype(first).view(second), kind.scalar))
        assert constraints.count(",") + 1 == len(kinds) + len(values)
        return Call(found)

    InterpreterBuilder.create_inline_asm = create
