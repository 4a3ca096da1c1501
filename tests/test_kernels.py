"""The kernels in Triton's CPU interpreter against their references, their text, their routes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from pq_compile import kernels
from pq_compile.errors import Refused
from pq_compile.formats import NVFP4
from pq_compile.kernels import KernelSpec, load, source, tuned
from tests.conftest import Golden
from tests.interpreting import Interpreter, interpreter
from tests.near_ties import near_ties

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
EXACT = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
BIAS = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
Packed = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as run:
        yield run


def same_codes(found: Packed, expected: Packed) -> bool:
    return (
        torch.equal(found[0], expected[0])
        and torch.equal(found[1].view(torch.uint8), expected[1].view(torch.uint8))
        and torch.equal(found[2], expected[2])
    )


def weight(n: int, k: int) -> Packed:
    return NVFP4.quantize(NVFP4.pad(torch.randn(n, k)))


def integers(rows: int, k: int) -> Tensor:
    """Multiples of what a group scale of 1 holds: their products sum without rounding."""
    x = torch.randint(-3, 4, (rows, k)).float()
    x[:, ::16] = 6.0
    return x


@DTYPES
@pytest.mark.parametrize(("rows", "k"), [(1, 16), (5, 48), (17, 272), (3, 120)])
def test_quantised_codes_are_those_of_the_reference(
    interpreted: Interpreter, dtype: torch.dtype, rows: int, k: int
) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, k) * torch.exp(2 * torch.randn(rows, k))).to(dtype)
    assert same_codes(interpreted(kernels.quantise, x), kernels.quantise_reference(x))


@DTYPES
def test_hard_groups_quantise_as_in_the_reference(
    interpreted: Interpreter, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 64, dtype=dtype)
    x[0] = 0
    x[1, 3], x[2, 20], x[3, 40] = math.nan, math.inf, -math.inf
    x[4] *= 1e-3
    x[5] *= 1e-5
    x[6] *= 1e-7
    x[7] = -x[7].abs() * 1e-6
    x[8, ::16] = 60000.0
    x[9] = -0.0
    x[10, :16], x[10, 16:32] = math.nan, torch.finfo(dtype).smallest_normal / 4
    assert same_codes(interpreted(kernels.quantise, x), kernels.quantise_reference(x))


@pytest.mark.parametrize("factor", [0.0, 1e-41, 1e-35, 1e-31, 1e34, math.nan], ids=str)
def test_tensors_at_the_ends_of_the_range_quantise_as_in_the_reference(
    interpreted: Interpreter, factor: float
) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 32) * factor
    assert same_codes(interpreted(kernels.quantise, x), kernels.quantise_reference(x))


@pytest.mark.parametrize("seed", range(4))
def test_ties_and_their_neighbours_quantise_as_in_the_reference(
    interpreted: Interpreter, seed: int
) -> None:
    x = near_ties(seed)
    assert same_codes(interpreted(kernels.quantise, x), kernels.quantise_reference(x))


@EXACT
@BIAS
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 16), (18, 70, 80), (3, 24, 144)])
def test_w4a4_products_of_integers_are_exact(
    interpreted: Interpreter, dtype: torch.dtype, with_bias: bool, rows: int, n: int, k: int
) -> None:
    torch.manual_seed(rows)
    a, w = NVFP4.quantize(integers(rows, k)), NVFP4.quantize(integers(n, k))
    a, w = (a[0], a[1], torch.tensor(0.5)), (w[0], w[1], torch.tensor(2.0**-19))
    bias = torch.randint(-4, 5, (n,)).to(dtype) if with_bias else None
    expected = kernels.matmul_w4a4_reference(a, w, bias, dtype)
    assert torch.equal(
        interpreted(kernels.matmul_w4a4, a, w, bias, dtype, "w4a4_portable"), expected
    )


@EXACT
@BIAS
@pytest.mark.parametrize("kind", ["w4a16_vector", "w4a16_portable"])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 8, 16), (5, 40, 120), (16, 17, 88)])
def test_w4a16_products_of_integers_are_exact(
    interpreted: Interpreter,
    dtype: torch.dtype,
    with_bias: bool,
    kind: Literal["w4a16_vector", "w4a16_portable"],
    rows: int,
    n: int,
    k: int,
) -> None:
    torch.manual_seed(rows)
    packed, scales, _ = NVFP4.quantize(NVFP4.pad(integers(n, k)))
    w = (packed, scales, torch.tensor(2.0**-10))
    x = torch.randint(-4, 5, (rows, k)).to(dtype)
    bias = torch.randint(-4, 5, (n,)).to(dtype) if with_bias else None
    expected = kernels.matmul_w4a16_reference(x, w, bias)
    assert torch.equal(interpreted(kernels.matmul_w4a16, x, w, bias, kind), expected)


def test_random_products_agree_to_the_order_of_the_sum(interpreted: Interpreter) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(6, 200), weight(30, 200)
    a = kernels.quantise_reference(x)
    cases = {
        "w4a4": (
            interpreted(kernels.matmul_w4a4, a, w, None, torch.float32, "w4a4_portable"),
            NVFP4.dequantize(*a).double() @ NVFP4.dequantize(*w).double().T,
        ),
        "w4a16": (
            interpreted(kernels.matmul_w4a16, x.double(), w, None, "w4a16_vector"),
            x.double() @ NVFP4.dequantize(*w).double().T[:200],
        ),
    }
    for name, (found, expected) in cases.items():
        assert (found.double() - expected).norm() <= 1e-6 * expected.norm(), name


def test_every_scale_code_decodes_in_the_product(interpreted: Interpreter) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    w = (torch.full((16, 128), 0x22, dtype=torch.uint8), codes.view(torch.float8_e4m3fn))
    x = torch.zeros(16, 256).index_put((torch.arange(16), torch.arange(16) * 16), torch.ones(()))
    scaled = (*w, torch.ones(()))
    found = interpreted(kernels.matmul_w4a16, x, scaled, None, "w4a16_vector")
    clean = [row for row in range(16) if row not in (7, 15)]  # those hold the code of NaN
    expected = codes.view(torch.float8_e4m3fn).float().T
    assert torch.equal(found[:, clean], expected[:, clean])
    assert found[:, [7, 15]].isnan().all()


def test_what_is_nan_reaches_its_own_outputs_and_no_others(interpreted: Interpreter) -> None:
    torch.manual_seed(3)
    x, dense = torch.randn(6, 80), torch.randn(20, 80)
    x[2, 5], dense[7, 3] = math.nan, math.nan
    a, w = interpreted(kernels.quantise, x), NVFP4.quantize(dense)
    expected = torch.zeros(6, 20, dtype=torch.bool)
    expected[2], expected[:, 7] = True, True
    for y in (
        interpreted(kernels.matmul_w4a4, a, w, None, torch.float32, "w4a4_portable"),
        interpreted(kernels.matmul_w4a16, x, w, None, "w4a16_vector"),
        interpreted(kernels.matmul_w4a16, x, w, None, "w4a16_portable"),
    ):
        assert torch.equal(y.isnan(), expected)


SPECS = {
    "peak": KernelSpec("peak", 120),
    "quantise": KernelSpec("quantise", 256, dtype=torch.float16),
    "quantise_by_instruction": KernelSpec("quantise", 256, instruction=True),
    "w4a4_native": KernelSpec("w4a4_native", 3072, 3072, tile=(128, 128, 256), bias=True, stages=3),
    "w4a4_portable": KernelSpec("w4a4_portable", 256, 1024, tile=(128, 128, 64), warps=8),
    "w4a16_portable": KernelSpec("w4a16_portable", 120, 250, tile=(16, 64, 64)),
    "w4a16_half": KernelSpec(
        "w4a16_half", 3072, 18432, tile=(1, 8, 512), bias=True, instruction=True, warps=1
    ),
    "w4a16_integer": KernelSpec("w4a16_integer", 1040, 250, tile=(2, 8, 1024), warps=1, stages=1),
    "w4a16_vector": KernelSpec("w4a16_vector", 1280, 768, tile=(1, 16, 512), bias=True),
}


@pytest.mark.parametrize("name", SPECS)
def test_source_of(golden: Golden, name: str) -> None:
    golden(source(SPECS[name]))


@pytest.mark.parametrize("name", SPECS)
def test_a_kernel_loads_once_and_carries_its_text(name: str) -> None:
    kernel = load(SPECS[name])
    assert kernel is load(SPECS[name])
    assert kernel.fn.__name__ == SPECS[name].name
    assert kernel.src in source(SPECS[name])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (11, 0)])
def test_the_native_product_is_refused_where_triton_has_no_fp4_unit(
    capability: tuple[int, int],
) -> None:
    with pytest.raises(Refused, match=rf"{capability[0]}\.{capability[1]} has no FP4 tensor cores"):
        tuned("w4a4_native", capability, 128, k=256, n=256, dtype=torch.bfloat16)


def test_a_datacenter_blackwell_never_gets_a_tile_below_128_rows() -> None:
    for capability in ((10, 0), (10, 3)):
        for rows in (1, 16, 127, 4608):
            spec = tuned("w4a4_native", capability, rows, k=256, n=256, dtype=torch.bfloat16)
            assert spec.tile[0] == 128
