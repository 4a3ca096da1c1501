"""Row programs and the decoding of weights compiled for every target: instructions, registers."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
import triton

from pq_compile import row_kernels, scratch_text
from pq_compile.row_text import Phase, RowKernel
from pq_compile.rows import Target, parse
from pq_compile.scratch_text import DecodeKernel
from tests import aot
from tests.aot import own_cache

__all__ = ["own_cache"]

PROGRAMS = {
    "modulate": "row 3072 | sample 3072 | sample 3072 | layer_norm 0 1e-06 | add 2 1.0 | mul 3 4 "
    "| add 5 1 | keep 6 bfloat16 | {}",
    "join": "row 3072 | row 12288 | gelu_tanh 1 | keep 2 bfloat16 | {}",
    "ragged": "row 240 | row 240 | silu 0 | mul 2 1 | keep 3 bfloat16 | {}",
}
PARTS = {"modulate": "6", "join": "0 2", "ragged": "3"}
EVERYWHERE = ("join",)
TARGETS = (90, 100, 103, 120, 121)
MAIN = (90, 100, 120)
PHASES: dict[Target, tuple[Phase, ...]] = {
    "fp8": ("once",),
    "none": ("once",),
    "nvfp4": ("peak", "codes"),
    "nvfp4_fp8": ("codes",),
    "nvfp4_half": ("codes",),
}
CODES = {"fp8": "*fp8e4nv", "nvfp4": "*u8", "nvfp4_fp8": "*fp8e4nv", "nvfp4_half": "*bf16"}
MOST_REGISTERS = 192
MOST_SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6) else 8
"""The assembler of Triton 3.6 keeps two registers of one program on the stack."""


def kernel_of(name: str, to: Target, phase: Phase) -> RowKernel:
    last = to if to == "none" else f"{to} {PARTS[name]}"
    program = parse(PROGRAMS[name].format(last))
    widest = max(program.width, *program.widths)
    warps = 4 if widest <= 4096 else 8 if widest <= 16384 else 16
    return RowKernel(program, phase, warps=warps, instruction=True)


def compiled(kernel: RowKernel, target: int) -> Any:
    function, to = row_kernels.load(kernel), kernel.program.target
    types = {
        "peak": "*i32",
        "tensor": "*fp32",
        "codes": CODES.get(to, "*u8"),
        "count": "i32",
        "T": "i32",
    }
    types["scales"] = "*fp8e4nv" if to == "nvfp4" else "*fp32"
    for name in function.arg_names:
        if name not in types:
            types[name] = "*bf16" if re.fullmatch(r"x\d+|kept\d+", name) else "i32"
    return aot.compiled(function, types, target, kernel.warps, 2, fusion=True)


CASES = [
    pytest.param(name, to, phase, target, id=f"{name}-{to}-{phase}-sm{target}")
    for target in TARGETS
    for name in (PROGRAMS if target in MAIN else EVERYWHERE)
    for to, phases in PHASES.items()
    for phase in phases
]


def test_every_target_of_a_program_is_compiled() -> None:
    assert set(PHASES) == set(get_args(Target))


@pytest.mark.parametrize(("name", "to", "phase", "target"), CASES)
def test_a_row_program_compiles_without_spilling(
    name: str, to: Target, phase: Phase, target: int
) -> None:
    kernel = compiled(kernel_of(name, to, phase), target)
    used = aot.usage(kernel)
    assert used.spilled <= MOST_SPILLED
    assert used.registers <= MOST_REGISTERS


@pytest.mark.parametrize("target", MAIN)
def test_rows_are_read_and_written_sixteen_bytes_at_a_time(target: int) -> None:
    ptx = compiled(kernel_of("modulate", "none", "once"), target).asm["ptx"]
    wide = re.findall(r"(ld|st)\.global(?:\.\w+)*\.v4\.b32", ptx)
    assert set(wide) == {"ld", "st"}
    assert not re.search(r"ld\.global(?:\.\w+)*\.b16", ptx)


@pytest.mark.parametrize("target", MAIN)
def test_rows_in_e4m3_are_converted_by_instruction(target: int) -> None:
    ptx = compiled(kernel_of("modulate", "fp8", "once"), target).asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("precision", "outputs"), [("fp8", (9216, 3072)), ("half", (3072,))])
def test_weights_decode_without_spilling(target: int, precision: Any, outputs: Any) -> None:
    kernel = DecodeKernel(precision, 3072, outputs, bias=True, instruction=precision == "fp8")
    function = scratch_text.load(kernel)
    types = {"out": "*fp8e4nv" if precision == "fp8" else "*bf16"}
    types |= {"column": "*fp32", "bias": "*bf16"}
    kinds = {"w": "*u8", "s": "*fp8e4nv", "t": "*fp32", "b": "*bf16"}
    types |= {name: kinds[name[0]] for name in function.arg_names if name not in types}
    found = aot.compiled(function, types, target, kernel.warps, 2, fusion=True)
    used = aot.usage(found)
    assert used.spilled == 0
    assert used.registers <= MOST_REGISTERS
    assert re.search(r"ld\.global(?:\.\w+)*\.v[24]\.b32", found.asm["ptx"])
