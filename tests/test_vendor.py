"""The vendor's NVFP4 products: the tiles of scales, the calls, and why they can't be made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pq_compile import products, vendor
from pq_compile.errors import Refused
from pq_compile.formats import NVFP4

Packed = tuple[Tensor, Tensor, Tensor]
SHAPES = pytest.mark.parametrize(("rows", "n", "k"), [(128, 256, 64), (5, 48, 96), (200, 144, 160)])
BIAS = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])


def unswizzled(tiles: Tensor, rows: int, groups: int) -> Tensor:
    """Byte by byte, from where the tensor cores find it."""
    flat = tiles.contiguous().view(torch.uint8).flatten()
    r, c = torch.arange(rows)[:, None], torch.arange(groups)[None, :]
    tile = (r // 128) * (tiles.shape[1] // 4) + c // 4
    return flat[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4]


def operands(rows: int, n: int, k: int) -> tuple[Packed, Packed]:
    torch.manual_seed(rows)
    return NVFP4.quantize(torch.randn(rows, k)), NVFP4.quantize(torch.randn(n, k))


def decoded(packed: Tensor, tiles: Tensor) -> Tensor:
    """Elements times scales, from what a vendor's function is given."""
    rows, k = packed.shape[0], packed.shape[1] * 2
    scales = unswizzled(tiles, rows, k // 16).view(torch.float8_e4m3fn)
    return NVFP4.decode(packed.contiguous(), scales)


@pytest.mark.parametrize(("rows", "groups"), [(128, 4), (256, 12), (1, 1), (130, 5), (37, 192)])
def test_every_scale_lies_where_the_tensor_cores_read_it(rows: int, groups: int) -> None:
    codes = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    tiles = vendor.swizzle(codes.view(torch.float8_e4m3fn))
    assert tiles.dtype == torch.float8_e4m3fn
    assert tiles.is_contiguous()
    assert tiles.shape[0] % 128 == 0
    assert tiles.shape[1] % 4 == 0
    assert torch.equal(unswizzled(tiles, rows, groups), codes)
    assert tiles.view(torch.uint8).count_nonzero() == codes.count_nonzero()


def test_a_view_of_scales_is_laid_out_as_its_copy() -> None:
    codes = torch.randint(0, 256, (300, 24), dtype=torch.uint8)
    view = codes[40:168, 8:20].view(torch.float8_e4m3fn)
    tiles = vendor.swizzle(view).view(torch.uint8)
    assert torch.equal(tiles, vendor.swizzle(view.clone()).view(torch.uint8))


@SHAPES
@BIAS
def test_scaled_mm_is_asked_for_the_product_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int, with_bias: bool
) -> None:
    kinds, orders = functional.ScalingType, functional.SwizzleType

    def scaled_mm(
        x: Tensor,
        w: Tensor,
        x_scales: Sequence[Tensor],
        x_recipe: Sequence[Any],
        w_scales: Sequence[Tensor],
        w_recipe: Sequence[Any],
        x_order: Sequence[Any],
        w_order: Sequence[Any],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        assert x_recipe == w_recipe == [kinds.BlockWise1x16, kinds.TensorWise]
        assert x_order == w_order == [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
        assert w.stride(0) == 1
        assert x.shape[0] >= 128
        left = decoded(x.view(torch.uint8), x_scales[0])
        y = left @ decoded(w.t().view(torch.uint8), w_scales[0]).T
        y = y * (x_scales[1] * w_scales[1])
        return (y if bias is None else y + bias).to(dtype)

    monkeypatch.setattr(functional, "scaled_mm", scaled_mm)
    a, w = operands(rows, n, k)
    bias = torch.randn(n) if with_bias else None
    y = vendor.by_scaled_mm(a, w, bias, torch.float32)
    expected = vendor.reference(a, w, bias, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)


@SHAPES
@BIAS
def test_flashinfer_is_asked_for_the_product_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, rows: int, n: int, k: int, with_bias: bool
) -> None:
    def mm_fp4(
        x: Tensor, w: Tensor, x_scales: Tensor, w_scales: Tensor, alpha: Tensor, dtype: torch.dtype
    ) -> Tensor:
        assert (w.stride(0), w_scales.stride(0)) == (1, 1)
        assert x_scales.shape == (-(-rows // 128) * 128, -(-k // 64) * 4)
        assert alpha.shape == (1,)
        y = decoded(x, x_scales) @ decoded(w.t(), w_scales.t()).T
        return (y * alpha).to(dtype)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(mm_fp4=mm_fp4))
    a, w = operands(rows, n, k)
    bias = torch.randn(n) if with_bias else None
    y = vendor.by_flashinfer(a, w, bias, torch.float32)
    expected = vendor.reference(a, w, bias, torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)


def test_torch_takes_the_operands_of_scaled_mm() -> None:
    """Shapes, strides and dtypes, as a CUDA device would check them."""
    with torch.device("meta"):
        a, w = (
            (
                torch.empty(rows, 64, dtype=torch.uint8),
                torch.empty(rows, 8, dtype=torch.uint8).view(torch.float8_e4m3fn),
                torch.empty(()),
            )
            for rows in (40, 256)
        )
        y = vendor.by_scaled_mm(a, w, torch.empty(256, dtype=torch.bfloat16), torch.bfloat16)
    assert y.shape == (40, 256)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "n", "k", "why"),
    [
        ("w4a4_scaled_mm", (9, 0), torch.bfloat16, 256, 256, "9.0 has no FP4 tensor cores"),
        ("w4a4_native", (8, 9), torch.bfloat16, 256, 256, "8.9 has no FP4 tensor cores"),
        ("w4a4_scaled_mm", (10, 0), torch.float32, 256, 256, "not torch.float32"),
        ("w4a4_scaled_mm", (12, 0), torch.bfloat16, 250, 256, "N=250 must be multiples"),
        ("w4a4_flashinfer", (12, 1), torch.bfloat16, 256, 48, "K=48 and"),
        ("w4a4_flashinfer", (10, 3), torch.bfloat16, 256, 256, "flashinfer is not installed"),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    n: int,
    k: int,
    why: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why in vendor.missing(kind, capability, dtype, n, k)


@pytest.mark.parametrize("kind", ["w4a4_native", "w4a4_scaled_mm", "w4a4_flashinfer"])
def test_nothing_is_missing_on_a_blackwell_with_both_libraries(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for capability in ((10, 0), (10, 3), (12, 0), (12, 1)):
        assert vendor.missing(kind, capability, torch.bfloat16, 3072, 3072) == ""


def test_a_product_that_cannot_be_made_is_refused() -> None:
    a, w = operands(4, 16, 32)
    with pytest.raises(Refused, match=r"w4a4_scaled_mm: a device of compute capability 0\.0"):
        vendor.matmul(a, w, None, torch.bfloat16, "w4a4_scaled_mm")


class Device:
    """A Blackwell in name: each product takes the milliseconds it is given, or fails."""

    def __init__(self, patch: pytest.MonkeyPatch, took: dict[str, float | Exception]) -> None:
        self.took, self.calls, self.now = took, list[str](), 0.0
        patch.setattr(vendor, "_found", {})
        patch.setattr(vendor, "PRODUCTS", {kind: self.product(kind) for kind in took})
        patch.setattr("importlib.util.find_spec", lambda name: object())
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def product(self, kind: str) -> Any:
        def call(*_: object) -> None:
            self.calls.append(kind)
            took = self.took[kind]
            if isinstance(took, Exception):
                raise took
            self.now += took

        return call


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_the_fastest_is_measured_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(
        monkeypatch,
        {"w4a4_native": 3.0, "w4a4_scaled_mm": 2.0, "w4a4_flashinfer": RuntimeError("no kernel")},
    )
    a, w = operands(8, 32, 64)
    assert vendor.fastest(a, w, None, torch.bfloat16) == "w4a4_scaled_mm"
    assert set(device.calls) == set(device.took)
    measured = len(device.calls)
    assert vendor.fastest(a, w, None, torch.bfloat16) == "w4a4_scaled_mm"
    assert len(device.calls) == measured
    device.took["w4a4_scaled_mm"] = 4.0
    assert vendor.fastest(*operands(20, 32, 64), None, torch.bfloat16) == "w4a4_native"


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, {"w4a4_native": 3.0, "w4a4_scaled_mm": 2.0})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert vendor.fastest(*operands(8, 32, 64), None, torch.bfloat16) == "w4a4_native"
    assert device.calls == []


def test_the_route_fastest_multiplies_each_weight_by_what_was_soonest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = iter(["w4a4_native", "w4a4_scaled_mm"])
    asked: list[str] = []

    def product(a: Any, w: Any, bias: Any, dtype: torch.dtype, kind: str) -> Tensor:
        asked.append(kind)
        return vendor.reference(a, w, bias, dtype)

    monkeypatch.setattr(vendor, "fastest", lambda *given: next(kinds))
    monkeypatch.setattr(vendor, "matmul", product)
    a, *weights = (NVFP4.quantize(torch.randn(n, 64)) for n in (3, 16, 32))
    biases = [torch.randn(16), torch.randn(32)]
    y = products.multiply(a, weights, biases, "w4a4_fastest", torch.float32)
    assert asked == ["w4a4_native", "w4a4_scaled_mm"]
    expected = [
        vendor.reference(a, w, b, torch.float32) for w, b in zip(weights, biases, strict=True)
    ]
    assert torch.equal(y, torch.cat(expected, -1))
