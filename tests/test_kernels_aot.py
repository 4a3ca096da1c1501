"""The products compiled for every target that runs them, no GPU needed: instructions, registers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton

from pq_compile.kernels import FP4_SINCE, KernelSpec, Kind, load, tuned
from pq_compile.routes import Where, choose
from tests import aot
from tests.aot import own_cache

__all__ = ["own_cache"]

TARGETS = (80, 89, 90, 100, 103, 120, 121)
MAIN = (90, 100, 120)
ROWS: dict[Kind, tuple[int, ...]] = {
    "peak": (4608,),
    "quantise": (4608,),
    "w4a4_native": (1, 64, 4608),
    "w4a4_portable": (1, 64, 4608),
    "w4a16_portable": (17, 33, 64, 4608),
    "w4a16_vector": (1, 4, 16),
    "w4a16_half": (1, 2, 4, 16),
    "w4a16_integer": (1, 4),
}
SHAPES = {"regular": (3072, 3072), "ragged": (120, 250)}


def capability_of(target: int) -> tuple[int, int]:
    return divmod(target, 10)


def runs_on(kind: Kind, target: int) -> bool:
    """Whether some call on ``target`` leads to ``kind``."""
    if kind in ("peak", "quantise", "w4a16_half", "w4a16_integer"):
        return True
    scheme = kind.split("_")[0]
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    where = Where(capability_of(target), version, "nvfp4", torch.float32)
    return kind in {choose(scheme, where._replace(rows=rows)).kind for rows in (1, 99)}


def spec_of(
    kind: Kind, target: int, rows: int, shape: str, dtype: torch.dtype = torch.bfloat16
) -> KernelSpec:
    k, n = SHAPES[shape]
    if kind in ("w4a16_half", "w4a16_integer"):
        k -= k % 16
    extra: dict[str, Any] = {"n": n, "bias": True}
    if kind in ("peak", "quantise"):
        extra = {"instruction": kind == "quantise" and capability_of(target) in FP4_SINCE}
    return tuned(kind, capability_of(target), rows, k=k, dtype=dtype, **extra)


def compiled(spec: KernelSpec, target: int) -> Any:
    function, pointer = load(spec), aot.POINTERS[spec.dtype]
    types = dict.fromkeys(function.arg_names, "*u8") | {"M": "i32", "peak_ptr": "*i32"}
    types |= {"x_ptr": pointer, "y_ptr": pointer, "bias_ptr": pointer}
    types |= {f"{prefix}tensor_scale_ptr": "*fp32" for prefix in ("", "a_", "w_")}
    return aot.compiled(function, types, target, spec.warps, spec.stages, fusion=False)


CASES = [
    pytest.param(kind, target, rows, id=f"{kind}-sm{target}-{rows}")
    for kind in ROWS
    for target in TARGETS
    for rows in (ROWS[kind] if target in MAIN else ROWS[kind][-1:])
    if runs_on(kind, target)
]


MOST_REGISTERS: dict[Kind, int] = {"peak": 64, "quantise": 128, "w4a16_half": 168}
"""Of a thread, where it isn't what the hardware gives to so many warps."""


@pytest.mark.parametrize(("kind", "target", "rows"), CASES)
def test_it_compiles_without_spilling(kind: Kind, target: int, rows: int) -> None:
    for shape in SHAPES if target in MAIN and rows == ROWS[kind][-1] else ("regular",):
        spec = spec_of(kind, target, rows, shape)
        used = aot.usage(compiled(spec, target))
        assert used.spilled == 0
        hardware = min(255, aot.REGISTERS // (32 * spec.warps))
        assert used.registers <= MOST_REGISTERS.get(kind, hardware)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("kind", [kind for kind in ROWS if runs_on(kind, 90)])
def test_the_other_dtypes_compile_without_spilling(kind: Kind, dtype: torch.dtype) -> None:
    if kind in ("w4a16_half", "w4a16_integer") and dtype == torch.float32:
        return  # "w4a16_vector" takes those
    spec = spec_of(kind, 90, ROWS[kind][-1], "regular", dtype)
    assert aot.usage(compiled(spec, 90)).spilled == 0


@pytest.mark.parametrize("target", [target for target in TARGETS if runs_on("w4a4_native", target)])
@pytest.mark.parametrize("rows", [1, 4608])
def test_the_native_product_is_one_of_e2m1_with_e4m3_scales_of_sixteen(
    target: int, rows: int
) -> None:
    ptx = compiled(spec_of("w4a4_native", target, rows, "regular"), target).asm["ptx"]
    products = set(re.findall(r"(?:tcgen05\.mma|mma\.sync|wgmma)[\w.:]*", ptx))
    assert products
    for product in products:
        assert "mxf4nvf4" in product
        assert "4X" in product or "block16" in product
        assert "ue8m0" not in product
        if product.startswith("mma.sync"):  # tcgen05 says so in its descriptor instead
            assert product.endswith("ue4m3")


@pytest.mark.parametrize("target", [100, 103])
def test_the_scale_type_in_the_tcgen05_descriptor_is_e4m3(target: int) -> None:
    """Bits 23 and 24 of the instruction descriptor are 0; scales of e8m0 set one of them."""
    ptx = compiled(spec_of("w4a4_native", target, 4608, "regular"), target).asm["ptx"]
    descriptors = re.findall(r"tcgen05\.mma[^;]*?\], *%rd\d+, *%rd\d+, *(%r\d+),", ptx)
    assert descriptors
    for register in descriptors:
        value = re.search(rf"mov\.b32\s+{register}, (-?\d+);", ptx)
        assert value is not None
        assert not int(value[1]) >> 23 & 3


@pytest.mark.parametrize("target", [100, 120])
def test_fp4_hardware_packs_by_instruction(target: int) -> None:
    ptx = compiled(spec_of("quantise", target, 4608, "regular"), target).asm["ptx"]
    assert "cvt.rn.satfinite.e2m1x2.f32" in ptx


def test_hopper_packs_and_multiplies_without_fp4_instructions() -> None:
    kinds: tuple[Kind, ...] = ("quantise", "w4a4_portable")
    texts = [compiled(spec_of(kind, 90, 4608, "regular"), 90).asm["ptx"] for kind in kinds]
    assert not any("e2m1" in ptx for ptx in texts)
    assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16" in texts[1]


def test_weights_are_loaded_sixteen_bytes_at_a_time() -> None:
    cases: tuple[tuple[int, Kind], ...] = (
        (90, "w4a4_portable"),
        (100, "w4a4_native"),
        (120, "w4a4_native"),
    )
    for target, kind in cases:
        ptx = compiled(spec_of(kind, target, 4608, "regular"), target).asm["ptx"]
        assert len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)) > 0


def test_no_kernel_multiplies_and_adds_at_once_where_codes_are_made() -> None:
    for target in MAIN:
        ptx = compiled(spec_of("quantise", target, 4608, "regular"), target).asm["ptx"]
        assert not re.search(r"\bfma\.rn\.f32", ptx)
        assert ".ftz" not in ptx
        assert "div.rn.f32" in ptx
        assert not re.search(r"div\.(full|approx)|rcp\.approx", ptx)


@pytest.mark.parametrize(("target", "unit"), [(100, "UTCOMMA"), (103, "UTCOMMA"), (120, "OMMA")])
def test_the_assembler_reaches_the_fp4_unit(target: int, unit: str) -> None:
    code = aot.machine_code(compiled(spec_of("w4a4_native", target, 4608, "regular"), target))
    products = {line.split()[0].split(".")[0] for line in code if "MMA" in line.split()[0]}
    assert products == {unit}


@pytest.mark.parametrize(
    ("kind", "most"), [("w4a16_half", 3.0), ("w4a16_integer", 3.4)], ids=["half", "integer"]
)
def test_a_row_by_a_weight_takes_few_instructions(kind: Kind, most: float) -> None:
    """At 18432 x 3072 a Hopper GPU issues 4 for each element while it reads the weight."""
    spec = tuned(kind, (9, 0), 1, k=3072, n=18432, dtype=torch.bfloat16, bias=True)
    spec = replace(spec, tile=(1, 8, 512), stages=2)
    kernel = compiled(spec, 90)
    code = aot.machine_code(kernel)
    loop = [line.split()[0] for line in aot.longest_loop(code)]
    assert len(loop) <= most * 8 * 512 / 32
    assert loop.count("LDG.E.64") == loop.count("LDG.E.U8") == 8  # a group and a scale a lane
    assert loop.count("LDG.E.128") == 2  # 16 channels of x
    assert not any(line.startswith(("LDS", "STS", "BAR", "SHFL")) for line in loop)
    assert sum("UBLKPF.L2" in line for line in code) == 2
    used = aot.usage(kernel).registers  # 18 warps to a multiprocessor hold all 2304 programs
    assert 18 * 32 * -(-used // 8) * 8 <= aot.REGISTERS
