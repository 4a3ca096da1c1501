"""Products alone: rates by shape and route beside cuBLAS in bf16, and the modulation's vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_compile import ops

from . import fp8, timing
from .operands import Packed, Shape, bytes_of, dense, rows, weight

Record = dict[str, Any]
Route = Callable[[Tensor, Packed, Tensor], Callable[[], object]]

FLUX = (
    Shape(4608, 9216, 3072, 38),
    Shape(4608, 12288, 3072, 38),
    Shape(4608, 3072, 15360, 38),
    Shape(4096, 9216, 3072, 19),
    Shape(4096, 3072, 3072, 19),
    Shape(4096, 12288, 3072, 19),
    Shape(4096, 3072, 12288, 19),
    Shape(512, 9216, 3072, 19),
    Shape(512, 3072, 3072, 19),
    Shape(512, 12288, 3072, 19),
    Shape(512, 3072, 12288, 19),
)
"""The block linears of FLUX.1-dev at 1024 x 1024, with Q, K and V as one."""

VECTORS = (Shape(1, 18432, 3072), Shape(1, 9216, 3072), Shape(4, 18432, 3072))
"""Its modulation linears: of a double block, of a single one, and of four pictures."""


def _bf16(x: Tensor, w: Packed, bias: Tensor) -> Callable[[], object]:
    full = dense(w)
    return lambda: F.linear(x, full, bias)


def _fp8(x: Tensor, w: Packed, bias: Tensor) -> Callable[[], object]:
    """Both operands in fp8 before: what the vendor's GEMM alone takes."""
    a, a_scale = fp8.by_rows(x)
    b, b_scale = fp8.by_rows(dense(w))
    columns = b_scale.T.contiguous()
    return lambda: torch._scaled_mm(
        a,
        b.t(),
        scale_a=a_scale,
        scale_b=columns,
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def _matmul(a: list[Tensor], w: Packed, bias: Tensor, kind: str) -> Tensor:
    return ops.matmul(a, [w[0]], [w[1]], [w[2]], [bias], kind, torch.bfloat16)


def _scratch_fp8(x: Tensor, w: Packed, bias: Tensor) -> Callable[[], object]:
    """Rows in fp8 before; the weight decoded to fp8 each time."""
    a = list(fp8.by_rows(x))
    return lambda: _matmul(a, w, bias, "fp8")


def _scratch_half(x: Tensor, w: Packed, bias: Tensor) -> Callable[[], object]:
    """Rows as 16-bit operands before; the weight decoded exactly each time; the sums in fp32."""
    return lambda: _matmul([x], w, bias, "half")


ROUTES: dict[str, Route] = {
    "bf16 cuBLAS": _bf16,
    "fp8 vendor, weights fp8": _fp8,
    "NVFP4 -> fp8 scratch": _scratch_fp8,
    "NVFP4 -> 16-bit scratch": _scratch_half,
}
"""Products whose left operand is ready: the quantiser is counted in the bandwidth table."""


def gemm(device: str, shapes: Sequence[Shape] = FLUX, repetitions: int = 5) -> list[Record]:
    """TFLOP/s of every route for every shape, on operands that rotate beyond the L2 cache."""
    return [_gemm(shape, device, repetitions) for shape in shapes]


def _gemm(shape: Shape, device: str, repetitions: int) -> Record:
    count = timing.sets(shape.n * shape.k // 2 + 2 * shape.m * (shape.k + shape.n))
    given = [_given(shape, device) for _ in range(count)]
    record: Record = {"shape": list(shape[:3]), "times": shape.times, "ms": {}, "tflops": {}}
    for name, route in ROUTES.items():
        try:
            found = timing.rotating([route(*one) for one in given], repetitions)
        except RuntimeError as error:  # no such units, or no such kernel
            record.setdefault("missing", {})[name] = str(error).partition("\n")[0][:200]
            continue
        record["ms"][name] = found
        record["tflops"][name] = shape.flops / found["median"] / 1e9
    return record


def _given(shape: Shape, device: str) -> tuple[Tensor, Packed, Tensor]:
    bias = torch.randn(shape.n, device=device).to(torch.bfloat16)
    return rows(shape.m, shape.k, device)[0], weight(shape.n, shape.k, device), bias


def modulation(
    device: str, shapes: Sequence[Shape] = VECTORS, repetitions: int = 7
) -> list[Record]:
    """A few rows by NVFP4 weights against cuBLAS in bf16, weights rotating beyond the L2 cache."""
    return [_modulation(shape, device, repetitions) for shape in shapes]


def _modulation(shape: Shape, device: str, repetitions: int) -> Record:
    x, _, bias = _given(shape, device)
    moved = {
        "bf16 cuBLAS": 2 * (shape.n * shape.k + shape.m * (shape.k + shape.n) + shape.n),
        "permuquant": bytes_of(*weight(shape.n, shape.k, device), x, bias) + 2 * shape.m * shape.n,
    }
    record: Record = {"shape": list(shape[:3]), "us": {}, "gb_per_s": {}}
    for name, moves in moved.items():
        weights = [weight(shape.n, shape.k, device) for _ in range(timing.sets(moves))]
        route = _bf16 if name == "bf16 cuBLAS" else _vector
        found = timing.rotating([route(x, w, bias) for w in weights], repetitions)
        record["us"][name] = 1e3 * found["median"]
        record["gb_per_s"][name] = moves / found["median"] / 1e6
    record["kernel"] = ops.where(x.device, "nvfp4", "w4a16", shape.m)
    record["ratio"] = record["us"]["bf16 cuBLAS"] / record["us"]["permuquant"]
    return record


def _vector(x: Tensor, w: Packed, bias: Tensor) -> Callable[[], object]:
    return lambda: torch.ops.permuquant.linear(x, *w, bias, "nvfp4", "w4a16")
