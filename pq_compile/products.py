"""Quantised rows by the packed weights that read them, on every route; and the definition of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import kernels, row_kernels, scratch, vendor
from .formats import NVFP4
from .scratch import Weight


def multiply(
    a: Sequence[Tensor],
    weights: Sequence[Weight],
    biases: Sequence[Tensor],
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """``reference`` on a CUDA device; sums in fp32 in another order."""
    match kind:
        case "fp8":
            return scratch.matmul_fp8(a[0], a[1], weights, biases).to(dtype)
        case "half":
            return _finished(*scratch.matmul_half(a[0], a[1:], weights, biases), dtype)
        case _:
            each: Sequence[Tensor | None] = biases or [None] * len(weights)
            pairs = zip(weights, each, strict=True)
            found = [_packed((a[0], a[1], a[2]), w, b, dtype, kind) for w, b in pairs]
            return found[0] if len(found) == 1 else torch.cat(found, -1)


def reference(
    a: Sequence[Tensor],
    weights: Sequence[Weight],
    biases: Sequence[Tensor],
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] in ``dtype``: rows [M, K] by each weight [N_i, K], side by side, plus biases [N_i].

    ``kind`` says what ``a`` holds: "fp8" e4m3 codes and scales [M, 1], and weights are rounded to
    e4m3 too; "half" bfloat16 and a tensor scale, or bfloat16 alone; any other packed NVFP4. Sums in
    fp32, in fp64 for fp64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    precision: Any = "fp8" if kind == "fp8" else "half"
    w, column, bias = scratch.decode_reference(weights, biases, precision)
    x = NVFP4.decode(a[0], a[1]) if a[0].dtype == torch.uint8 else a[0]
    scale = a[-1] if len(a) > 1 else 1.0
    y = torch.mm(x.to(wide), w.to(wide).T) * column * scale
    return (y if bias is None else y + bias).to(dtype)


def _packed(a: Weight, w: Weight, bias: Tensor | None, dtype: torch.dtype, kind: Any) -> Tensor:
    """Packed rows by one weight: by our kernel ``kind``, or by the code soonest for its shape."""
    if kind == "w4a4_fastest":
        return vendor.matmul(a, w, bias, dtype, vendor.fastest(a, w, bias, dtype))
    return kernels.matmul_w4a4(a, w, bias, dtype, kind)


def _finished(y: Tensor, column: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``y * column + bias``, rounded once."""
    n, word = y.shape[1], str(dtype).removeprefix("torch.")
    if bias is None:
        program = f"row {n} | sample {n} | mul 0 1 | keep 2 {word} | none"
        return row_kernels.run(program, [y, column])[0]
    program = f"row {n} | sample {n} | sample {n} | mul 0 1 | add 3 2 | keep 4 {word} | none"
    return row_kernels.run(program, [y, column, bias])[0]
