"""NVFP4 by NVFP4 on the vendor's libraries, beside the own kernel: cuBLASLt and FlashInfer.

Both read scales in tiles of 128 rows by 4 groups (``swizzle``) and multiply by the tensor scales
themselves. Weights keep their rows of scales: the tiles are made for a call, of one byte for every
16 elements. ``fastest`` measures which code is best for a shape.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .errors import Refused
from .kernels import FP4_SINCE, matmul_w4a4, matmul_w4a4_reference

Operand = tuple[Tensor, Tensor, Tensor]
"""Packed uint8 [rows, K/2], e4m3 scales [rows, K/16], tensor scale fp32 []."""

ROWS, GROUPS = 128, 4
"""Of a tile of scales."""

log = logging.getLogger(__name__)


def swizzle(scales: Tensor) -> Tensor:
    """``scales`` [R, C], one byte each, as the tiles [R', C'] that tensor cores read.

    R' and C' are R and C rounded up to 128 and 4, zeros in what is added. Of tile (r // 128,
    c // 4) scale (r, c) is byte ``(r % 32) * 16 + (r % 128 // 32) * 4 + c % 4``; tiles follow one
    another along c, then r.
    """
    codes = scales.view(torch.uint8)
    short = (0, -scales.shape[1] % GROUPS, 0, -scales.shape[0] % ROWS)
    whole = functional.pad(codes, short) if any(short) else codes.contiguous()
    rows, groups = whole.shape
    words = whole.view(torch.int32)  # four groups of a row stay side by side
    tiles = words.view(rows // ROWS, 4, 32, groups // GROUPS).permute(0, 3, 2, 1)
    return tiles.contiguous().view(scales.dtype).view(rows, groups)


def missing(kind: str, capability: tuple[int, int], dtype: torch.dtype, n: int, k: int) -> str:
    """Why ``kind`` can't multiply by a weight [n, k] into ``dtype`` there; empty if it can."""
    where = "{}.{}".format(*capability)
    if capability not in FP4_SINCE:
        return f"{kind}: a device of compute capability {where} has no FP4 tensor cores"
    if kind == "w4a4_native":
        return ""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{kind}: it writes bfloat16 and float16, not {dtype}"
    if k % 32 or n % 16:
        return f"{kind}: K={k} and N={n} must be multiples of 32 and 16"
    if kind == "w4a4_scaled_mm" and not hasattr(functional, "scaled_mm"):
        return f"{kind}: torch {torch.__version__} has no torch.nn.functional.scaled_mm"
    if kind == "w4a4_flashinfer" and importlib.util.find_spec("flashinfer") is None:
        return f"{kind}: flashinfer is not installed: pip install flashinfer-python"
    return ""


def matmul(a: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype, kind: str) -> Tensor:
    """``reference`` by ``kind``: [M, N] in ``dtype``. Sums in fp32 in another order.

    Raises ``Refused`` with the sentence of ``missing`` where it can't.
    """
    capability = torch.cuda.get_device_capability(a[0].device) if a[0].is_cuda else (0, 0)
    if why := missing(kind, capability, dtype, len(w[0]), 2 * w[0].shape[1]):
        raise Refused(f"permuquant: {why}")
    return PRODUCTS[kind](a, w, bias, dtype)


reference = matmul_w4a4_reference


def by_scaled_mm(a: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``torch.nn.functional.scaled_mm`` with two levels of scales: of groups, of tensors."""
    kinds, orders = functional.ScalingType, functional.SwizzleType
    recipe = [kinds.BlockWise1x16, kinds.TensorWise]
    order = [orders.SWIZZLE_32_4_4, orders.NO_SWIZZLE]
    rows = len(a[0])
    packed = functional.pad(a[0], (0, 0, 0, max(ROWS - rows, 0)))  # cuBLASLt wants a whole tile
    y = functional.scaled_mm(
        packed.view(torch.float4_e2m1fn_x2),
        w[0].view(torch.float4_e2m1fn_x2).t(),
        [swizzle(a[1]), a[2]],
        recipe,
        [swizzle(w[1]), w[2]],
        recipe,
        order,
        order,
        None if bias is None else bias.to(dtype),
        dtype,
    )
    return y[:rows]


def by_flashinfer(a: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``flashinfer.mm_fp4``, whose own tuner chooses among its kernels."""
    flashinfer: Any = importlib.import_module("flashinfer")
    x_scales, w_scales = (swizzle(one[1]).view(torch.uint8) for one in (a, w))
    alpha = (a[2] * w[2]).reshape(1)
    y: Tensor = flashinfer.mm_fp4(a[0], w[0].t(), x_scales, w_scales.t(), alpha, dtype)
    return y if bias is None else y.add_(bias)


def by_triton(a: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The own kernel, on rows of scales."""
    return matmul_w4a4(a, w, bias, dtype, "w4a4_native")


Product = Callable[[Operand, Operand, Tensor | None, torch.dtype], Tensor]
PRODUCTS: dict[str, Product] = {
    "w4a4_native": by_triton,
    "w4a4_scaled_mm": by_scaled_mm,
    "w4a4_flashinfer": by_flashinfer,
}
_found: dict[tuple[object, ...], str] = {}


def fastest(a: Operand, w: Operand, bias: Tensor | None, dtype: torch.dtype) -> str:
    """The kind of ``PRODUCTS`` that multiplies these operands soonest; "w4a4_native" in doubt.

    Measured once for a device, a shape and a number of rows up to its next power of two; one that
    fails is left out and logged. While a CUDA graph is captured nothing can be measured.
    """
    n, k = len(w[0]), 2 * w[0].shape[1]
    key = (a[0].device, len(a[0]).bit_length(), n, k, dtype, bias is None)
    if key in _found:
        return _found[key]
    if torch.cuda.is_current_stream_capturing():
        return "w4a4_native"
    capability = torch.cuda.get_device_capability(a[0].device)
    kinds = [kind for kind in PRODUCTS if not missing(kind, capability, dtype, n, k)]
    took = {kind: _seconds(kind, partial(PRODUCTS[kind], a, w, bias, dtype)) for kind in kinds}
    _found[key] = min(took, key=took.__getitem__, default="w4a4_native")
    return _found[key]


def _seconds(kind: str, call: Callable[[], object]) -> float:
    """The least of a few calls; infinity if it can't be called."""
    event: Any = torch.cuda.Event
    took = []
    try:
        for _ in range(6):
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            took.append(float(start.elapsed_time(end)))
    except (RuntimeError, ValueError, NotImplementedError) as why:
        log.info("%s is left out: %s", kind, why)
        return math.inf
    return min(took)
