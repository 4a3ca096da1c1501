"""Every kernel compiled for every target that runs it, no GPU needed: instructions, registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pq_compile.kernels import FP4_SINCE, KernelSpec, Kind, load, route, tuned

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TARGETS = (80, 89, 90, 100, 103, 120, 121)
MAIN = (90, 100, 120)
ROWS: dict[Kind, tuple[int, ...]] = {
    "peak": (4608,),
    "quantise": (4608,),
    "w4a4_native": (1, 64, 4608),
    "w4a4_portable": (1, 64, 4608),
    "w4a16_portable": (17, 33, 64, 4608),
    "w4a16_vector": (1, 4, 16),
}
SHAPES = {"regular": (3072, 3072), "ragged": (120, 250)}


def capability_of(target: int) -> tuple[int, int]:
    return divmod(target, 10)


def runs_on(kind: Kind, target: int) -> bool:
    """Whether some call on ``target`` leads to ``kind``."""
    if kind in ("peak", "quantise"):
        return True
    scheme = kind.split("_")[0]
    routes = {route(capability_of(target), triton.__version__, scheme, rows) for rows in (1, 99)}
    return kind in routes


def spec_of(
    kind: Kind, target: int, rows: int, shape: str, dtype: torch.dtype = torch.bfloat16
) -> KernelSpec:
    k, n = SHAPES[shape]
    extra: dict[str, Any] = {"n": n, "bias": True}
    if kind in ("peak", "quantise"):
        extra = {"instruction": kind == "quantise" and capability_of(target) in FP4_SINCE}
    return tuned(kind, capability_of(target), rows, k=k, dtype=dtype, **extra)


def compiled(spec: KernelSpec, target: int) -> Any:
    function = load(spec)
    types = {"M": "i32", "peak_ptr": "*i32", "x_ptr": POINTERS[spec.dtype]}
    types |= {"y_ptr": POINTERS[spec.dtype], "bias_ptr": POINTERS[spec.dtype]}
    types |= {f"{prefix}tensor_scale_ptr": "*fp32" for prefix in ("", "a_", "w_")}
    names = function.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name != "M"}
    signature = {name: types.get(name, "*u8") for name in names}
    text = ASTSource(function, signature=signature, constexprs={}, attrs=aligned)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": False}
    return triton.compile(text, target=GPUTarget("cuda", target, 32), options=options)


def stack_bytes(kernel: Any, folder: Path) -> int:
    """Bytes of local memory a thread spills to, as the assembler reports them."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", report)
    assert len(found) >= 2, report
    return sum(map(int, found))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


CASES = [
    pytest.param(kind, target, rows, id=f"{kind}-sm{target}-{rows}")
    for kind in ROWS
    for target in TARGETS
    for rows in (ROWS[kind] if target in MAIN else ROWS[kind][-1:])
    if runs_on(kind, target)
]


@pytest.mark.parametrize(("kind", "target", "rows"), CASES)
def test_it_compiles_without_spilling(kind: Kind, target: int, rows: int, tmp_path: Path) -> None:
    for shape in SHAPES if target in MAIN and rows == ROWS[kind][-1] else ("regular",):
        assert stack_bytes(compiled(spec_of(kind, target, rows, shape), target), tmp_path) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("kind", [kind for kind in ROWS if runs_on(kind, 90)])
def test_the_other_dtypes_compile_without_spilling(
    kind: Kind, dtype: torch.dtype, tmp_path: Path
) -> None:
    spec = spec_of(kind, 90, ROWS[kind][-1], "regular", dtype)
    assert stack_bytes(compiled(spec, 90), tmp_path) == 0


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
