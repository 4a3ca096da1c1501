"""The W4A16 products of a few rows: their assembly, interpreted, against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pq_compile import kernels, vector
from pq_compile.errors import Refused
from pq_compile.formats import NVFP4
from pq_compile.kernels import KernelSpec, tuned
from tests import ptx
from tests.interpreting import interpreter

Packed = tuple[Tensor, Tensor, Tensor]
Run = Callable[[KernelSpec, Tensor, Packed, Tensor | None], Tensor]
DESIGNS: tuple[Any, ...] = ("w4a16_half", "w4a16_integer")
EACH = pytest.mark.parametrize("design", DESIGNS)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def launched(spec: KernelSpec, x: Tensor, w: Packed, bias: Tensor | None) -> Tensor:
    """The product in float32, before it would be rounded to the dtype of ``x``."""
    ptx.install()
    y = x.new_empty((len(x), spec.n), dtype=torch.float32)
    weights = (w[0], w[1].view(torch.uint8), w[2])
    kernels.launch(spec, len(x), spec.n, x, *weights, y if bias is None else bias, y)
    return y


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with interpreter() as inside:
        yield lambda *arguments: inside(launched, *arguments)


def spec_of(design: Any, x: Tensor, n: int, bias: Tensor | None = None, **how: Any) -> KernelSpec:
    shape = {"k": x.shape[1], "n": n, "dtype": x.dtype, "bias": bias is not None}
    return replace(tuned(design, (9, 0), len(x), **shape), **how)


def error(y: Tensor, x: Tensor, w: Packed) -> float:
    exact = x.double() @ NVFP4.dequantize(*w).double().T
    return float((y.double() - exact).norm() / exact.norm())


@EACH
@DTYPES
@pytest.mark.parametrize(
    ("rows", "n", "k", "how"),
    [
        (1, 8, 16, {}),
        (1, 13, 512, {"stages": 1}),
        (2, 16, 1040, {"instruction": False}),
        (5, 9, 560, {"tile": (4, 4, 1024)}),
        (3, 16, 1024, {"tile": (1, 16, 512), "stages": 3}),
    ],
)
def test_products_of_integers_are_exact(
    run: Run, design: Any, dtype: torch.dtype, rows: int, n: int, k: int, how: dict[str, Any]
) -> None:
    torch.manual_seed(k)
    dense = torch.randint(-3, 4, (n, k)).float()
    dense[:, ::16] = 6.0
    packed, scales, _ = NVFP4.quantize(dense)
    w = (packed, scales, torch.tensor(2.0**-10))
    x = torch.randint(-4, 5, (rows, k)).to(dtype)
    bias = torch.randint(-4, 5, (n,)).to(dtype) if n % 2 else None
    found = run(spec_of(design, x, n, bias, **how), x, w, bias)
    assert torch.equal(found, kernels.matmul_w4a16_reference(x.float(), w, bias))


@DTYPES
@pytest.mark.parametrize("size", [1e4, 1.0, 1e-4, 6e-7])
def test_sums_are_as_close_as_the_design_says(run: Run, dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(1)
    w = NVFP4.quantize(torch.randn(24, 1024))
    x = (torch.randn(2, 1024) * torch.exp(torch.randn(2, 1024)) * size).clamp(-6e4, 6e4).to(dtype)
    halves = error(run(spec_of("w4a16_half", x, 24), x, w, None), x, w)
    integers = error(run(spec_of("w4a16_integer", x, 24), x, w, None), x, w)
    assert 1e-5 < halves < 6e-4
    assert integers < 5e-5


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e36])
def test_the_ends_of_bfloat16_are_as_close_in_halves(run: Run, size: float) -> None:
    torch.manual_seed(2)
    packed, scales, _ = NVFP4.quantize(torch.randn(8, 256))
    w = (packed, torch.full_like(scales.float(), 2.0**-6).to(scales.dtype), torch.ones(()))
    x = (torch.randn(1, 256).clamp(-1, 1) * size).bfloat16()
    assert error(run(spec_of("w4a16_half", x, 8), x, w, None), x, w) < 6e-4


@EACH
@DTYPES
def test_every_code_by_every_scale_is_exact(run: Run, design: Any, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    elements = torch.arange(16, dtype=torch.uint8).repeat(256, 1)
    packed = elements[:, 0::2] | elements[:, 1::2] << 4
    w = (packed, codes.view(torch.float8_e4m3fn), torch.ones(()))
    x = torch.eye(16, dtype=dtype)
    found = run(spec_of(design, x, 256, tile=(4, 64, 512)), x, w, None)
    expected = NVFP4.decode(w[0], w[1]).T
    missing = expected.isnan()
    assert torch.equal(found.isnan(), missing)
    assert torch.equal(found[~missing], expected[~missing])


@EACH
@DTYPES
def test_what_is_not_finite_reaches_its_own_row_and_no_other(
    run: Run, design: Any, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    w = NVFP4.quantize(torch.randn(8, 64))
    x = torch.randn(6, 64).to(dtype)
    x[1, 5], x[2, 20], x[4, 63] = math.nan, math.inf, -math.inf
    found = run(spec_of(design, x, 8), x, w, None)
    expected = kernels.matmul_w4a16_reference(x, w, None)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert found[1].isnan().all()


@pytest.mark.parametrize(
    ("kind", "capability", "k", "dtype", "expected"),
    [
        ("w4a16_vector", (9, 0), 3072, torch.bfloat16, "w4a16_half"),
        ("w4a16_vector", (8, 0), 16, torch.float16, "w4a16_half"),
        ("w4a16_vector", (9, 0), 120, torch.bfloat16, None),
        ("w4a16_vector", (9, 0), 3072, torch.float32, None),
        ("w4a16_vector", (0, 0), 3072, torch.bfloat16, None),
        ("w4a16_integer", (9, 0), 3072, torch.bfloat16, "w4a16_integer"),
        ("w4a16_portable", (9, 0), 3072, torch.bfloat16, None),
    ],
)
def test_which_design_serves(
    kind: str, capability: tuple[int, int], k: int, dtype: torch.dtype, expected: str | None
) -> None:
    assert vector.choose(kind, capability, k=k, dtype=dtype) == expected


@EACH
@pytest.mark.parametrize(("k", "dtype"), [(120, torch.bfloat16), (128, torch.float32)])
def test_a_design_refuses_what_it_cannot_read(design: Any, k: int, dtype: torch.dtype) -> None:
    with pytest.raises(Refused, match=f"{design} takes bfloat16 and float16 in groups of 16"):
        tuned(design, (9, 0), 1, k=k, n=8, dtype=dtype)


def test_nothing_is_fetched_ahead_unasked() -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        spec = tuned("w4a16_half", capability, 1, k=3072, n=64, dtype=torch.bfloat16)
        assert "prefetch.L2" not in kernels.source(spec)
        assert ("e4m3x2" in kernels.source(spec)) == (capability >= (8, 9))


def test_no_prefetch_reaches_beyond_the_weights() -> None:
    """Of a program's bytes at most all but 15 are asked for, from the next multiple of 16 on."""
    for k, n in ((3072, 64), (1024, 8), (16, 8)):
        spec = tuned("w4a16_half", (9, 0), 2, k=k, n=n, dtype=torch.bfloat16)
        spec = replace(spec, stages=2)
        asked = [line for line in kernels.source(spec).splitlines() if "prefetch((" in line]
        whole = [8 * k // 16, 8 * k // 2]
        assert [int(line.split(", ")[1]) for line in asked] == [w - 15 for w in whole if w >= 64]


def words(*values: int) -> Any:
    return np.array(values, dtype=np.uint64)


def test_the_interpreter_permutes_bytes_as_the_manual_says() -> None:
    a, b = words(0x03828100), words(0x07068504)
    assert ptx.permute(a, b, words(0x7531)) == 0x07850381
    assert ptx.permute(a, b, words(0xFDA9)) == 0x00FFFFFF


def test_the_interpreter_combines_bits_as_the_manual_says() -> None:
    x, y, z = words(0xF0F0A5A5), words(0xCCCC00FF), words(0xAAAA1234)
    for lut, expected in ((0xE4, x & z | y & ~z), (0x96, x ^ y ^ z), (0x80, x & y & z)):
        assert ptx.table(x, y, z, words(lut)) & ptx.LOW == expected & ptx.LOW


def test_the_interpreter_sums_products_of_bytes_by_their_signs() -> None:
    a, b = words(0x80FF0102), words(0xFF02FE7F)
    unsigned = 0x80 * 0xFF + 0xFF * 2 + 1 * 0xFE + 2 * 0x7F + 5
    mixed = 0x80 * -1 + 0xFF * 2 + 1 * -2 + 2 * 0x7F + 5
    assert ptx.dot4((False, False))(a, b, words(5)) == unsigned
    assert ptx.dot4((False, True))(a, b, words(5)) == mixed


def test_an_instruction_it_does_not_know_fails() -> None:
    with pytest.raises(KeyError, match="popc"):
        ptx.run("{ popc.b32 $0, $1; }", 1, [words(1)])
