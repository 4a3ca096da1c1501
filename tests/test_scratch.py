"""Decoding weights into a scratch: kernels against the definition, and the vendor's products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_compile import products, row_kernels, scratch
from pq_compile.formats import NVFP4
from pq_compile.generated import Launch
from pq_compile.minifloat import E4M3
from pq_compile.rows import parse, quantise_rows, reference
from pq_compile.scratch import SIDE, Weight, decode, decode_reference
from pq_compile.scratch_text import DecodeKernel, Precision, load, source
from tests import ptx
from tests.conftest import Golden
from tests.interpreting import Interpreter, interpreter
from tests.programs import differing

PRECISIONS: tuple[Precision, ...] = ("fp8", "half")
EACH = pytest.mark.parametrize("precision", PRECISIONS)
OUTPUTS = pytest.mark.parametrize(
    ("outputs", "k"), [((5,), 16), ((32, 48, 16), 96), ((250, 1), 48), ((300,), 272)], ids=str
)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreter]:
    with interpreter() as run:
        yield run


def weights(outputs: Sequence[int], k: int) -> list[Weight]:
    """Weights of tensor scales of their own, with groups down to zero."""
    torch.manual_seed(k)
    each = [
        torch.randn(n, k) * n * torch.logspace(0, -6, k // 16).repeat_interleave(16)
        for n in outputs
    ]
    return [NVFP4.quantize(x) for x in each]


def every_code() -> list[Weight]:
    """Every element with every scale that a weight can have, which is finite and has no sign."""
    elements = torch.arange(16, dtype=torch.uint8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).view(127, 1).view(torch.float8_e4m3fn)
    return [(elements[:, 0::2] | elements[:, 1::2] << 4, scales, torch.tensor(0.5))]


def by_assembly(given: Sequence[Weight], biases: Sequence[Tensor]) -> list[Tensor]:
    """``decode`` to fp8 as a device does it, its assembly interpreted."""
    ptx.install()
    outputs, k = tuple(len(w[0]) for w in given), 2 * given[0][0].shape[1]
    kernel = DecodeKernel("fp8", k, outputs, bool(biases), instruction=True, block=64)
    out = torch.empty(sum(outputs), k, dtype=torch.float8_e4m3fn)
    column, bias = torch.empty(1, sum(outputs)), torch.empty(sum(outputs))
    arguments: list[Tensor] = []
    for i, (packed, scales, tensor_scale) in enumerate(given):
        arguments += (packed, scales, tensor_scale, biases[i] if biases else tensor_scale)
    Launch(load(kernel), (sum(kernel.blocks),))([*arguments, out, column, bias])
    return [out, column, *([bias] if biases else [])]


def equal(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert [a is None for a in found] == [b is None for b in expected]
    return differing([a for a, _ in pairs if a is not None], [b for _, b in pairs]) == 0


@EACH
@OUTPUTS
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_weights_are_decoded_bit_by_bit(
    interpreted: Interpreter,
    precision: Precision,
    outputs: tuple[int, ...],
    k: int,
    with_bias: bool,
) -> None:
    given = weights(outputs, k)
    biases = [torch.randn(n) for n in outputs] if with_bias else []
    found = interpreted(decode, given, biases, precision)
    assert equal(found, decode_reference(given, biases, precision))


@EACH
def test_a_factor_of_all_rows_is_multiplied_in(
    interpreted: Interpreter, precision: Precision
) -> None:
    given, factor = weights((16, 48), 64), torch.tensor(0.37)
    found = interpreted(decode, given, [], precision, factor)
    assert equal(found, decode_reference(given, [], precision, factor))
    assert not equal(found[1:2], decode_reference(given, [], precision)[1:2])


@EACH
def test_every_code_is_decoded(interpreted: Interpreter, precision: Precision) -> None:
    given = every_code()
    found = interpreted(decode, given, [], precision)
    assert equal(found, decode_reference(given, [], precision))


@OUTPUTS
def test_the_assembly_decodes_as_the_definition(
    interpreted: Interpreter, outputs: tuple[int, ...], k: int
) -> None:
    given, biases = weights(outputs, k), [torch.randn(n) for n in outputs]
    found = interpreted(by_assembly, given, biases)
    assert equal(found, decode_reference(given, biases, "fp8"))


def test_the_assembly_decodes_every_code(interpreted: Interpreter) -> None:
    found = interpreted(by_assembly, every_code(), [])
    assert equal([*found, None], decode_reference(every_code(), [], "fp8"))


def test_what_is_decoded_to_16_bits_is_exact() -> None:
    for given in (weights((40,), 64), every_code()):
        packed, scales, tensor_scale = given[0]
        held, column, _ = decode_reference(given, [], "half")
        exact = NVFP4.decode(packed, scales)
        assert differing([held.float()], [exact]) == 0
        assert torch.equal(column, tensor_scale.expand(1, len(packed)))


def test_what_is_decoded_to_fp8_loses_little() -> None:
    """A sixth keeps every 6, 3 and 1.5: less is lost than by a scale for each row."""
    torch.manual_seed(1)
    weight = NVFP4.quantize(torch.randn(64, 1024))
    exact = NVFP4.dequantize(*weight).double()
    held, column, _ = decode_reference([weight], [], "fp8")
    error = (held.double() * column.T - exact).norm() / exact.norm()
    codes, scale = quantise_rows(exact)
    by_row = (codes.double() * scale - exact).norm() / exact.norm()
    assert 0.01 < error < 0.015
    assert error < 0.75 * by_row


# ---------------------------------------------------------------- products


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of a device, on the CPU: by the definitions in place of kernels."""
    monkeypatch.setattr(scratch, "decode", decode_reference)
    mm: Any = torch.mm

    def widened(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Any:
        return mm(a.to(out_dtype or a.dtype), b.to(out_dtype or b.dtype))

    monkeypatch.setattr(torch, "mm", widened)
    monkeypatch.setattr(row_kernels, "run", lambda text, x: reference(parse(text), x))


CASES = pytest.mark.parametrize("outputs", [(32,), (16, 48, 16), (250,), (7, 1)], ids=str)


@pytest.mark.usefixtures("without_kernels")
@CASES
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("kind", "target"), [("fp8", "fp8"), ("fp8", "nvfp4_fp8"), ("half", "nvfp4_half")]
)
def test_products_by_a_scratch_are_those_of_the_definition(
    kind: str, target: str, outputs: tuple[int, ...], with_bias: bool
) -> None:
    given = weights(outputs, 96)
    biases = [torch.randn(n, dtype=torch.bfloat16) for n in outputs] if with_bias else []
    a = reference(parse(f"row 96 | {target} 0"), [torch.randn(5, 96)])
    for dtype in (torch.bfloat16, torch.float32):
        y = products.multiply(a, given, biases, kind, dtype)
        exact = products.reference(a, given, biases, kind, torch.float64)
        assert (y.shape, y.dtype, y.is_contiguous()) == ((5, sum(outputs)), dtype, True)
        error = (y.double() - exact).norm() / exact.norm()
        assert error < (2.5e-3 if dtype == torch.bfloat16 or kind == "fp8" else 1e-6)


@pytest.mark.usefixtures("without_kernels")
def test_an_activation_in_16_bits_is_multiplied_as_it_is() -> None:
    given, x = weights((32, 7), 96), torch.randn(5, 96, dtype=torch.bfloat16)
    y = products.multiply([x], given, [], "half", torch.float32)
    exact = x.double() @ torch.cat([NVFP4.dequantize(*w).double() for w in given]).T
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize(("k", "fast"), [(scratch.LONG, True), (scratch.LONG + 16, False)])
def test_long_sums_are_accumulated_slowly(
    monkeypatch: pytest.MonkeyPatch, k: int, fast: bool
) -> None:
    seen: list[bool] = []
    real: Any = torch._scaled_mm

    def record(*args: Tensor, use_fast_accum: bool, **how: Any) -> Any:
        seen.append(use_fast_accum)
        return real(*args, use_fast_accum=use_fast_accum, **how)

    monkeypatch.setattr(torch, "_scaled_mm", record)
    a = quantise_rows(torch.randn(2, k))
    scratch.matmul_fp8(*a, weights((SIDE,), k), [])
    assert seen == [fast]


# ---------------------------------------------------------------- text

KERNELS = {
    "one_weight_to_16_bits": DecodeKernel("half", 96, (250,), bias=True),
    "three_weights_to_fp8": DecodeKernel("fp8", 3072, (3072,) * 3, bias=True, instruction=True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_source_of(golden: Golden, name: str) -> None:
    golden(source(KERNELS[name]))


def test_the_codes_of_e4m3_are_those_of_torch() -> None:
    """On which the assembly's interpreter rests."""
    x = torch.cat([E4M3.values()[:127], torch.rand(1000) * 448])
    assert torch.equal(E4M3.encode(x), x.to(torch.float8_e4m3fn).view(torch.uint8))
